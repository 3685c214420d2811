"""The description of a guard, and the base class of guards that act through a callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError

__all__ = ["Guard", "OptimizerSettings", "TimedCallback"]


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The AdamW settings that a guard copies into its own optimizer."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Guard:
    """A protection of a training run, as the differences from the same run without it.

    The recipe sets everything else: initial weights, order of the data, schedule.
    """

    description: str
    """One line for tables and ``--help``."""
    source: str
    """The paper and its rule, or the package that implements it."""
    pss: PSSConfig = field(default_factory=lambda: PSSConfig(observe_only=True))
    """Options of PSS, which only observes unless the guard is PSS."""
    max_grad_norm: float | None = None
    """Clipping at this global norm. With 0 nothing is clipped; None leaves it to the recipe."""
    optimizer: Callable[[nn.Module, OptimizerSettings], Optimizer] | None = None
    """Builds the optimizer that replaces AdamW. With None the recipe's optimizer stays."""
    callback: Callable[[Trainer], TrainerCallback] | None = None
    """Acts during training, after PSS's callback."""
    needs_fault: bool = False
    """Whether the guard treats a run after the recipe's fault. Without a fault it does nothing."""
    prepare: Callable[[nn.Module], None] | None = None
    """Changes the model before training, when it has the recipe's initial weights."""


class TimedCallback(TrainerCallback):
    """A callback that acts around every step, and records its time and the steps it changed.

    A subclass overrides some of `prepare`, `before_step`, `before_update` and `after_step`.
    """

    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: Any

    def __init__(self) -> None:
        self.intervention_steps: list[int] = []
        """Steps, from 1, at which something was changed."""
        self.seconds = 0.0
        """Total time in this callback, including the steps without a change."""

    def prepare(self) -> None:
        """Get ready. This is called once, when training begins."""

    def before_step(self, step: int) -> None:
        """Act before the forward pass of a step."""

    def before_update(self) -> bool:
        """Act on the gradients, and return whether something was changed."""
        return False

    def after_step(self, step: int) -> bool:
        """Act after the optimizer's update, and return whether something was changed."""
        return False

    # ---- the Trainer's events ----

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the objects of the run, and call `prepare`.

        Raises:
            ConfigurationError: The trainer gave no model.
        """
        if model is None:
            raise ConfigurationError("This callback needs the model in on_train_begin; got none.")
        self.model, self.lr_scheduler = model, lr_scheduler
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        started = time.perf_counter()
        self.prepare()
        self.seconds += time.perf_counter() - started

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `before_step`."""
        self.before_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `before_update` and measure its time."""
        started = time.perf_counter()
        self._record(state.global_step + 1, self.before_update(), started)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `after_step` and measure its time."""
        started = time.perf_counter()
        self._record(state.global_step, self.after_step(state.global_step), started)

    def _record(self, step: int, has_acted: bool, started: float) -> None:
        self.seconds += time.perf_counter() - started
        if has_acted:
            self.intervention_steps.append(step)
