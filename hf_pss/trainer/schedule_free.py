"""Schedule-free optimizers in a Trainer: the averaged weights are evaluated, and saved."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = [
    "BackToTraining",
    "ScheduleFree",
    "ScheduleFreeCallback",
    "leave_training",
    "schedule_free",
    "unwrapped",
]


@runtime_checkable
class ScheduleFree(Protocol):
    """An optimizer whose parameters hold one sequence while training and another to be used."""

    def train(self) -> None:
        """Put the training sequence into the parameters."""

    def eval(self) -> None:
        """Put the averaged weights into the parameters."""


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer in Accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def schedule_free(optimizer: Any) -> ScheduleFree | None:
    """Return the schedule-free optimizer in Accelerate's wrapper, or None."""
    optimizer = unwrapped(optimizer)
    return optimizer if isinstance(optimizer, ScheduleFree) else None


class BackToTraining(TrainerCallback):
    """Returns to the training sequence at each step, and leaves the averaged weights at the end."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Return to the training sequence before the Trainer's `training_step` does."""
        if (switched := schedule_free(optimizer)) is not None:
            _forget_gathered_(model)
            switched.train()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leave the averaged weights in the model."""
        if (switched := schedule_free(optimizer)) is not None:
            switched.eval()


class ScheduleFreeCallback(BackToTraining):
    """Puts the averaged weights into the model before they are saved, and at the end.

    The Trainer calls ``optimizer.train()`` in each training step and ``optimizer.eval()`` before
    each evaluation, but not before a save. Without this callback

    - checkpoints hold the training sequence, unless an evaluation came directly before;
    - the best checkpoint is loaded into the training sequence;
    - FSDP2's root module uses the averaged weights, gathered for an evaluation, for the next
      gradient.

    Add it last, because it sees only the saves that earlier callbacks have requested. It switches
    any optimizer with ``train`` and ``eval`` and does nothing with others.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Switch to the averaged weights if they are used before the next step."""
        leave_training(optimizer, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Do the same at the end of an epoch."""
        leave_training(optimizer, control)


def _forget_gathered_(model: nn.Module | None) -> None:
    """Let FSDP2 gather again: after an evaluation its root module keeps the gathered weights."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_training(optimizer: Any, control: TrainerControl) -> None:
    """Put the averaged weights into the model where they are about to be used."""
    is_due = control.should_evaluate or control.should_save or control.should_training_stop
    if is_due and (switched := schedule_free(optimizer)) is not None:
        switched.eval()
