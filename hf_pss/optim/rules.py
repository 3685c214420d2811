"""The interface of an update rule, and the tables of rules and of update scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

from torch import Tensor

Options: TypeAlias = Mapping[str, Any]
"""The entries of a parameter group without its parameters, plus ``step``, which counts from 1, and
``loss``, the loss of the step or None."""

State: TypeAlias = dict[str, Tensor]
"""A rule's state for some matrices: tensors whose first dimension counts the matrices."""

Direction: TypeAlias = Callable[[Tensor, State, Options], tuple[Tensor, State]]
"""Maps momenta, shape (b, m, n) float32, and the rule's state from the previous call (empty at
first) to update directions of the same shape and the new state. The directions include the update
scale. The function is pure. The result for a matrix does not depend on the other matrices in the
stack, except for rounding."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to turn momentum into an update: W ← (1 − η λ) W − η · direction."""

    defaults: Mapping[str, Any]
    """The options of the rule, as plain values that checkpoints can hold."""
    check: Callable[[Options], None]
    """Raises `ConfigurationError` if an option is out of range."""
    direction: Direction


UPDATE_SCALES: Mapping[str, Callable[[int, int], float]] = {
    "aspect_clamped": lambda m, n: max(1.0, m / n) ** 0.5,
    "rms_match": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "aspect": lambda m, n: (m / n) ** 0.5,
    "max_dim": lambda m, n: max(m, n) ** 0.5,
}
"""The factor on an orthogonal update of an m × n matrix with m outputs and n inputs.

- `aspect_clamped`: K. Jordan et al. 2024, github.com/KellerJordan/Muon. It is torch's "original".
- `rms_match`: Liu et al. 2025, arXiv 2502.16982. The root mean square of an orthogonal m × n matrix
  is max(m, n)^-½, so that of the update is 0.2. This is about the same as AdamW's, so you can keep
  AdamW's learning rate. It is torch's "match_rms_adamw".
- `aspect`: Bernstein 2025, jeremybernste.in/writing/deriving-muon. The update's operator norm
  between root mean squares is 1.
- `max_dim`: The root mean square of the update is 1.
"""

RULES: Mapping[str, str] = {
    "muon": "muon",
    "normuon": "muon",
    "softmuon": "softmuon",
    "softsignum": "softmuon",
    "specmuon": "specmuon",
    "spectra": "spectra",
}
"""The module of `hf_pss.optim` that holds each rule, as a constant with its name in capitals. The
contract tests cover every row."""


def rule_named(name: str) -> Rule:
    """Return a rule of `RULES`. Its module is imported at the first use."""
    rule: Rule = getattr(import_module(f"hf_pss.optim.{RULES[name]}"), name.upper())
    return rule
