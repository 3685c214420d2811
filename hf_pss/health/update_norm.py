"""Norm of an optimizer update: ‖W_t − W_{t−1}‖ over the parameters that are watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend

__all__ = ["UpdateMeter"]


class UpdateMeter:
    """Measures one update; keeps a copy of the watched parameters while it happens.

    Cost: the memory of one copy and three passes over it at every step.
    """

    def __init__(self, names: Sequence[str], backend: Backend) -> None:
        self.names = tuple(names)
        self._backend = backend
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember the parameters as they are before the update."""
        self._before = [self._here(parameters[name]).clone() for name in self.names]

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of what changed since `start`, shape (1,), and forget the copy."""
        now = [self._here(parameters[name]) for name in self.names]
        changes = [
            torch.linalg.vector_norm(after.float() - before.float())
            for after, before in zip(now, self._before, strict=True)
        ]
        self._before = []
        device = changes[0].device
        total = (
            torch.stack([change.to(device) for change in changes])
            .double()
            .square()
            .sum()
            .reshape(1)
        )
        self._backend.total_(total)
        return total.sqrt()

    def _here(self, parameter: Tensor) -> Tensor:
        with self._backend.part(parameter) as part:
            return part.tensor
