"""Spectral norm of every selected matrix, followed by one round of power iteration a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["SpectralNorm", "SpectralNormMeter", "power_round"]

# Weyl: some singular value lies within residual · σ of the estimate.
_STALE_ABOVE = 0.05


@dataclass(frozen=True, slots=True)
class SpectralNorm:
    """An estimate of σ₁ from below, and how far its vectors are from a singular pair."""

    sigma: float
    """In the units of the matrix; NaN where it holds NaN or inf."""
    residual: float
    """‖Wᵀu − ‖Wv‖ v‖ / ‖Wᵀu‖ of the vectors that came in; NaN for a broken matrix. A small one says
    that they belong to *a* singular value: only a restart finds another that has overtaken it."""

    @property
    def is_stale(self) -> bool:
        """Whether the matrix moved faster than its vectors follow: residual above 0.05, or NaN."""
        return not self.residual <= _STALE_ABOVE


def power_round(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do one round of power iteration: u = Wv / ‖Wv‖, σ = ‖Wᵀu‖, v ← Wᵀu / σ.

    Golub & Van Loan, Matrix Computations, section 8.2, on WᵀW.

    Args:
        weight: (..., m, n), any real floating dtype.
        v: (..., n), unit vectors, float32, or float64 for a float64 weight.

    Returns:
        σ (...), never above σ₁ but for rounding; the new v (..., n), the old one where the matrix
        is not finite or maps it to zero; the residual (...) of the old one, 1 where v is mapped to
        zero by a matrix that is not.

    >>> weight = torch.diag(torch.tensor([2.0, 1.0]))
    >>> sigma, v, residual = power_round(weight, torch.tensor([1.0, 0.0]))
    >>> sigma.item(), v.tolist(), residual.item()
    (2.0, [1.0, 0.0], 0.0)
    """
    scaled = unit_scaled(weight)
    image = (scaled.matrix @ v.unsqueeze(-1)).squeeze(-1)
    length = torch.linalg.vector_norm(image, dim=-1)
    u = image / _nonzero(length).unsqueeze(-1)
    back = (scaled.matrix.mT @ u.unsqueeze(-1)).squeeze(-1)
    sigma = torch.linalg.vector_norm(back, dim=-1)
    residual = torch.linalg.vector_norm(back - length.unsqueeze(-1) * v, dim=-1) / _nonzero(sigma)
    is_zero = scaled.matrix.abs().amax(dim=(-2, -1)) == 0
    residual = torch.where((sigma == 0) & ~is_zero, 1.0, residual)
    moved = torch.where((sigma > 0).unsqueeze(-1), back / _nonzero(sigma).unsqueeze(-1), v)
    return scaled.restore(sigma), moved, torch.where(scaled.finite, residual, torch.nan)


class SpectralNormMeter:
    """Follows σ₁ and v₁ of the selected matrices through training.

    Cost: low, for every step. Two products of each matrix with a vector, one batched call a shape
    and one device-to-host read; memory, one vector a matrix. The first call and every
    ``restart_every``-th decompose instead, as `leading_triplets` does, for power iteration that
    sits on one singular vector never notices a larger one that is orthogonal to it.

    Args:
        views: What to read.
        backend: How parameters are stored.
        restart_every: Calls between two restarts; 1 restarts at every call.

    Raises:
        ConfigurationError: `restart_every` below 1.
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
        """Return the estimate for each 2-D matrix by name, and move the vectors one round on."""
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
        """Return v₁ of each 2-D matrix by name, (n,), as the last call left it."""
        return {
            name: v
            for names, stacked in self._vectors.items()
            for name, v in zip(names, stacked, strict=True)
        }


def _leading(matrices: Tensor) -> Tensor:
    v: Tensor = leading_triplets(matrices, 1, check_finite=False).v[..., 0]
    return v


def _nonzero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
