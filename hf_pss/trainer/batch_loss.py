"""Compute again the loss of a micro-batch that a Trainer has trained on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from hf_pss.trainer.seams import wrapped

# The attributes in which trl's trainers collect metrics while they compute a loss.
_METRICS = ("_metrics", "_stored_metrics", "_logs", "_total_train_tokens")


# The positional and the named arguments of a call of ``compute_loss``.
_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class BatchLoss:
    """Computes the loss of a micro-batch of a sound step in the same way as the Trainer.

    It calls the trainer's ``compute_loss`` with the arguments of the original call, so it works
    with every loss that a Trainer subclass defines. The call runs in evaluation mode and
    without gradients. It restores the random state, the mode of each module, and the metrics
    that trl's trainers collect.

    If a step spiked, the loss is computed on the last micro-batch of the last step that did not
    spike. The batch of the spiking step itself is often the abnormal one, and on random tokens a
    ruined model has a lower loss than a sound model. A resumed run has no earlier batch, so the
    stored batch is discarded at every save.

    Args:
        trainer: Any Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._latest: _Call | None = None
        self._sound: _Call | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Store the arguments of each call of ``compute_loss`` while the block runs."""
        with wrapped(self._trainer, "compute_loss", self._remember):
            yield

    def _remember(self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The containers are copied, because some trainers pop labels from them.
        self._latest = tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()}
        return compute_loss(*args, **kwargs)

    def end_step(self, *, is_sound: bool) -> None:
        """End a step. If it was sound, keep its last micro-batch for later steps."""
        if is_sound and self._latest is not None:
            self._sound = self._latest
        self._latest = None

    def forget(self) -> None:
        """Discard the stored batches."""
        self._sound = self._latest = None

    @torch.no_grad()
    def __call__(self, *, is_sound: bool) -> Tensor | None:
        """Return the loss as a scalar on its device, or None without a suitable batch.

        Args:
            is_sound: Whether the current step is sound. If so, its last micro-batch is used.
        """
        call = self._latest if is_sound and self._latest is not None else self._sound
        if call is None:
            return None
        trainer, own = self._trainer, vars(self._trainer)
        # The model with the wrappers that it has in training.
        model: nn.Module = call[0][0] if call[0] else call[1]["model"]
        metrics = {name: own[name] for name in _METRICS if name in own}
        own.update(copy.deepcopy(metrics))
        # The batch itself is copied, because some losses mask their inputs in place.
        args, kwargs = copy.deepcopy(call, {id(model): model})
        with _evaluating(model), untouched_randomness(model):
            try:
                with trainer.compute_loss_context_manager():
                    loss: Tensor = trainer.compute_loss(*args, **kwargs)
            finally:
                own.update(metrics)
        return loss.detach().float().mean()


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore its previous mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched_randomness(model: nn.Module) -> Iterator[None]:
    """Restore the random states of Python, NumPy and the model's devices at the end."""
    states = random.getstate(), np.random.get_state()
    used = {parameter.device for parameter in model.parameters()}
    devices = [device for device in used if device.type not in ("cpu", "mps", "meta")]
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
