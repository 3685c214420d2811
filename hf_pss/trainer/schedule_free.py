"""Make a Trainer evaluate and save the averaged weights of a schedule-free optimizer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl


@runtime_checkable
class ScheduleFree(Protocol):
    """An optimizer that trains one sequence of weights and provides averaged weights for use."""

    def train(self) -> None:
        """Put the training sequence into the parameters."""

    def eval(self) -> None:
        """Put the averaged weights into the parameters."""


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def schedule_free(optimizer: Any) -> ScheduleFree | None:
    """Return the optimizer inside Accelerate's wrappers if it is schedule-free, or None."""
    optimizer = unwrapped(optimizer)
    return optimizer if isinstance(optimizer, ScheduleFree) else None


class BackToTraining(TrainerCallback):
    """Returns to the training sequence at each step, and leaves the averaged weights at the end."""

    def on_step_begin(self, *args: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """Switch to the training sequence before the Trainer's `training_step` does so."""
        if (switched := schedule_free(optimizer)) is not None:
            # After an evaluation, the root module of FSDP2 still has its gathered weights.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            switched.train()

    def on_train_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        """Leave the averaged weights in the model."""
        if (switched := schedule_free(optimizer)) is not None:
            switched.eval()


class ScheduleFreeCallback(BackToTraining):
    """Puts the averaged weights into the model before each save and at the end of the run.

    The Trainer calls ``optimizer.train()`` in each training step and ``optimizer.eval()`` before
    each evaluation, but not before a save. Without this callback, three things go wrong:

    - A checkpoint holds the training sequence, unless an evaluation came directly before the save.
    - The best checkpoint is loaded into the training sequence.
    - The root module of FSDP2 has gathered the averaged weights for an evaluation, and it uses them
      to compute the next gradient.

    Add the callback last, because it sees only the saves that earlier callbacks have requested. It
    switches any optimizer that has ``train`` and ``eval``, and ignores other optimizers.
    """

    def on_step_end(
        self, args: Any, state: Any, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        """Switch to the averaged weights if they are used before the next step."""
        leave_training(optimizer, control)

    on_epoch_end = on_step_end


def leave_training(optimizer: Any, control: TrainerControl) -> None:
    """Put the averaged weights into the model if they are used before the next step."""
    is_due = control.should_evaluate or control.should_save or control.should_training_stop
    if is_due and (switched := schedule_free(optimizer)) is not None:
        switched.eval()
