"""The loss of a micro-batch that a Trainer has trained on, computed once more."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["BatchLoss"]

# Where trl's trainers collect metrics while they compute a loss.
_METRICS = ("_metrics", "_stored_metrics", "_logs", "_total_train_tokens")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of ``compute_loss``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Copy the containers, since some trainers take labels out of the batch."""
        return cls(tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()})

    @property
    def model(self) -> nn.Module:
        model = self.args[0] if self.args else self.kwargs["model"]
        assert isinstance(model, nn.Module)
        return model


class BatchLoss:
    """Computes the loss of a micro-batch of a sound step, as the Trainer does.

    It calls the trainer's own ``compute_loss`` with the arguments of that time, in evaluation mode
    and without gradients, so it fits every loss that a Trainer subclass defines. The random state,
    each module's mode, and the metrics that trl's trainers collect are as before afterwards.

    A step that spiked is tried on the last micro-batch of the last step that did not, because its
    own is often the odd one: on random tokens a ruined model has a lower loss than a sound one. A
    resumed run has no earlier batch, so the batch is forgotten at every save.

    Args:
        trainer: Any Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._latest: _Call | None = None
        self._sound: _Call | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the arguments of the trainer's ``compute_loss`` while the block runs."""
        trainer = self._trainer
        compute_loss = trainer.compute_loss

        def remember(*args: Any, **kwargs: Any) -> Any:
            self._latest = _Call.of(args, kwargs)
            return compute_loss(*args, **kwargs)

        # On the instance, so that every subclass's own method is heard.
        before = trainer.__dict__.get("compute_loss")
        trainer.compute_loss = remember
        try:
            yield
        finally:
            if before is None:
                del trainer.compute_loss
            else:
                trainer.compute_loss = before

    def end_step(self, *, is_sound: bool) -> None:
        """Keep the last micro-batch of a sound step for the steps after it."""
        if is_sound and self._latest is not None:
            self._sound = self._latest
        self._latest = None

    def forget(self) -> None:
        """Forget the batches of all steps so far."""
        self._sound = self._latest = None

    @torch.no_grad()
    def __call__(self, *, is_sound: bool) -> Tensor | None:
        """Return the loss, a scalar on its device; None where there is no batch of a sound step.

        Args:
            is_sound: Whether this step is, so that its own last micro-batch will do.
        """
        call = self._latest if is_sound and self._latest is not None else self._sound
        if call is None:
            return None
        trainer, model = self._trainer, call.model
        metrics = {k: copy.deepcopy(v) for k, v in vars(trainer).items() if k in _METRICS}
        fresh = _Call.of(call.args, call.kwargs)
        with _evaluating(model), _untouched_randomness(), trainer.compute_loss_context_manager():
            try:
                loss: Tensor = trainer.compute_loss(*fresh.args, **fresh.kwargs)
            finally:
                vars(trainer).update(metrics)
                _reshard(model)
        return loss.detach().float().mean()


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator()
    kind = device.type if device is not None and device.type != "mps" else None
    devices = [] if kind is None else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type=kind or "cuda"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _reshard(model: nn.Module) -> None:
    """Free what FSDP2 leaves gathered after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
