"""What a rule is: how a stack of momenta becomes a stack of directions.

Update scales: the factor on an orthogonal update, by the formula that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["UPDATE_SCALES", "Direction", "Options", "Rule", "State"]

Options: TypeAlias = Mapping[str, Any]
"""A parameter group without its parameters; beside its own entries ``step``, counted from 1, and
``loss``, the step's or None."""

State: TypeAlias = dict[str, Tensor]
"""What a rule remembers of some matrices: tensors whose first dimension counts the matrices."""

Direction: TypeAlias = Callable[[Tensor, State, Options], tuple[Tensor, State]]
"""From momenta (b, m, n), float32, and what the last call remembered of these matrices, nothing at
first, to directions (b, m, n), update scale included, and what to remember. Pure, and each matrix's
result is its own: which others are in the stack changes nothing but rounding."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to turn momentum into an update. W ← (1 − η λ) W − η · direction."""

    defaults: Mapping[str, Any]
    """Its own options: plain values, which checkpoints hold."""
    check: Callable[[Options], None]
    """Raises `ConfigurationError` for options that make no sense."""
    direction: Direction


UPDATE_SCALES: Mapping[str, Callable[[int, int], float]] = {
    "aspect_clamped": lambda m, n: max(1.0, m / n) ** 0.5,
    "rms_match": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "aspect": lambda m, n: (m / n) ** 0.5,
    "max_dim": lambda m, n: max(m, n) ** 0.5,
}
"""Of an m × n matrix, m outputs and n inputs.

`aspect_clamped`: K. Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch's "original".
`rms_match`: Liu et al. 2025, arXiv 2502.16982; an orthogonal m × n matrix has the root mean square
max(m, n)^-½, so the update's is 0.2, about AdamW's, and AdamW's learning rate carries over; torch's
"match_rms_adamw". `aspect`: Bernstein 2025, jeremybernste.in/writing/deriving-muon; the update's
operator norm between root mean squares is 1. `max_dim`: the update's root mean square is 1.
"""
