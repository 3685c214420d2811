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
        """Go back to training before the Trainer's own `training_step` does."""
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

    The Trainer itself calls ``optimizer.train()`` in each training step and ``optimizer.eval()``
    before each evaluation, but not before a save: its checkpoints hold the point of the next
    gradient, unless an evaluation came just before. It also loads the best checkpoint into whatever
    sequence the parameters hold, which must be the averaged one by then. And FSDP2's root would use
    what was gathered for an evaluation, the averaged weights, for the next gradient.

    Add it last: it sees a save that another callback has asked for only if that was before. Any
    optimizer with ``train`` and ``eval`` is switched; with others it does nothing.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leave training where the weights are to be used before the next step."""
        leave_training(optimizer, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Do the same where an epoch's end asks for it."""
        leave_training(optimizer, control)


def _forget_gathered_(model: nn.Module | None) -> None:
    """Let FSDP2 gather anew: after an evaluation the root keeps its parameters as they were."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_training(optimizer: Any, control: TrainerControl) -> None:
    """Put the averaged weights into the model where they are about to be used."""
    is_due = control.should_evaluate or control.should_save or control.should_training_stop
    if is_due and (switched := schedule_free(optimizer)) is not None:
        switched.eval()
