"""The interface of an update rule, and the table of update scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Options: TypeAlias = Mapping[str, Any]
"""The entries of a parameter group without its parameters, and ``step``, counted from 1, and
``loss``, that of the step or None."""

State: TypeAlias = dict[str, Tensor]
"""A rule's state for some matrices: tensors whose first dimension counts the matrices."""

Direction: TypeAlias = Callable[[Tensor, State, Options], tuple[Tensor, State]]
"""Maps momenta, shape (b, m, n) float32, and the rule's state from the previous call (empty at
first) to update directions of the same shape, update scale included, and the new state. Pure. The
result for a matrix does not depend on the others in the stack, except for rounding."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to turn momentum into an update. W ← (1 − η λ) W − η · direction."""

    defaults: Mapping[str, Any]
    """Its own options, as plain values that checkpoints can hold."""
    check: Callable[[Options], None]
    """Raises `ConfigurationError` for options out of range."""
    direction: Direction


UPDATE_SCALES: Mapping[str, Callable[[int, int], float]] = {
    "aspect_clamped": lambda m, n: max(1.0, m / n) ** 0.5,
    "rms_match": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "aspect": lambda m, n: (m / n) ** 0.5,
    "max_dim": lambda m, n: max(m, n) ** 0.5,
}
"""The factor on an orthogonal update of an m × n matrix, m outputs and n inputs.

`aspect_clamped`: K. Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch's "original".
`rms_match`: Liu et al. 2025, arXiv 2502.16982; an orthogonal m × n matrix has the root mean square
max(m, n)^-½, so that of the update is 0.2, about the same as AdamW's, and AdamW's learning rate
carries over; torch's "match_rms_adamw". `aspect`: Bernstein 2025,
jeremybernste.in/writing/deriving-muon; the update's operator norm between root mean squares is 1.
`max_dim`: the update's root mean square is 1.
"""
