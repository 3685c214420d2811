"""What a guard is: the one description that every compared protection fits into.

What the guards that act through a callback have in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from hf_pss.config import PSSConfig

__all__ = ["ActingCallback", "Guard", "OptimizerSettings"]


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW's numbers, which a guard that brings its own optimizer takes over."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Guard:
    """A protection of a training run: what differs from the same run without one.

    Everything else (initial weights, order of the data, schedule) is the recipe's.
    """

    description: str
    """One line for tables and ``--help``."""
    source: str
    """Paper and rule, or the package that the rule is taken from."""
    pss: PSSConfig = field(default_factory=lambda: PSSConfig(observe_only=True))
    """PSS as an observer, unless the guard is PSS."""
    max_grad_norm: float | None = None
    """Clipping at this global norm; 0 does not clip, None leaves it to the recipe."""
    optimizer: Callable[[nn.Module, OptimizerSettings], Optimizer] | None = None
    """Builds the optimizer that takes AdamW's place; None keeps the recipe's."""
    callback: Callable[[Trainer], TrainerCallback] | None = None
    """Acts during training; added behind PSS's own callback."""
    needs_fault: bool = False
    """Whether it treats a run after the recipe's fault, and means nothing without one."""
    prepare: Callable[[nn.Module], None] | None = None
    """Changes the model before training, at the recipe's initial weights."""


class ActingCallback(TrainerCallback):
    """A callback that changes gradients, weights or rates, and says when and for how long."""

    def __init__(self) -> None:
        self.intervention_steps: list[int] = []
        """Steps, from 1, at which something was changed."""
        self.seconds = 0.0
        """Time inside the guard, watching included."""

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
