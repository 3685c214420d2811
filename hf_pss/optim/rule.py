"""What a rule is: how a stack of momenta becomes a stack of directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Direction", "Options", "Rule", "State"]

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
