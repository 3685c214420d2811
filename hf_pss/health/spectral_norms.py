"""Spectral norm of every selected matrix, updated by one round of power iteration per call.

`hf_pss.health.tracked` lists all methods for σ₁ and their accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.health.subspace_rounds import power_round
from hf_pss.linalg import leading_triplets
from hf_pss.models.batching import stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["SpectralNorm", "SpectralNormMeter"]

# By Weyl's theorem, some singular value lies within residual · σ of the estimate.
_STALE_ABOVE = 0.05


@dataclass(frozen=True, slots=True)
class SpectralNorm:
    """An estimate of σ₁ from below, and the distance of its vectors from a singular pair."""

    sigma: float
    """In the units of the matrix. It is NaN if the matrix holds NaN or inf."""
    residual: float
    """‖Wᵀu − ‖Wv‖ v‖ / ‖Wᵀu‖ of the vectors before the round. It is NaN if the matrix holds NaN or
    inf. If it is small, the vectors belong to some singular value. Only a restart finds a different
    value that has become larger."""

    @property
    def is_stale(self) -> bool:
        """Whether the vectors lag behind the matrix: the residual is above 0.05, or NaN."""
        return not self.residual <= _STALE_ABOVE


class SpectralNormMeter:
    """Tracks σ₁ and v₁ of the selected matrices during training.

    The first call and every ``restart_every``-th call use `leading_triplets` instead, because power
    iteration that has converged to one singular vector never finds a larger one orthogonal to it.

    Cost: light, for every step. There are two products of each matrix with a vector, one batched
    call per shape, and one device-to-host read. The memory is one vector per matrix.

    Args:
        views: The matrices to read.
        backend: How parameters are stored.
        restart_every: The number of calls between two restarts. 1 restarts at every call.

    Raises:
        ConfigurationError: `restart_every` is below 1.
    """

    def __init__(
        self, views: Sequence[MatrixView], backend: Backend, *, restart_every: int = 50
    ) -> None:
        if restart_every < 1:
            raise ConfigurationError(f"You gave restart_every={restart_every}; give 1 or more.")
        self._views = tuple(views)
        self._backend = backend
        self._restart_every = restart_every
        self._num_calls = 0
        self._vectors: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def measure(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, SpectralNorm]:
        """Do one round, and return the estimate for each 2-D matrix by name."""
        names: list[str] = []
        numbers = []
        restarts = self._num_calls % self._restart_every == 0
        for stack in stacks(self._views, parameters, self._backend):
            names += stack.names
            v = _leading(stack.matrices) if restarts else self._vectors[stack.names]
            sigma, v, residual = power_round(stack.matrices, v)
            self._vectors[stack.names] = v
            numbers.append(torch.stack([sigma, residual], dim=-1))
        self._num_calls += 1
        if not numbers:
            return {}
        device = numbers[0].device
        host = self._backend.agree(torch.cat([n.to(device) for n in numbers]).flatten())
        pairs = zip(host[::2], host[1::2], strict=True)
        return {name: SpectralNorm(*pair) for name, pair in zip(names, pairs, strict=True)}

    def directions(self) -> dict[str, Tensor]:
        """Return v₁ of each 2-D matrix by name, (n,), as of the last call."""
        return {
            name: v
            for names, stacked in self._vectors.items()
            for name, v in zip(names, stacked, strict=True)
        }


def _leading(matrices: Tensor) -> Tensor:
    v: Tensor = leading_triplets(matrices, 1, check_finite=False).v[..., 0]
    return v
