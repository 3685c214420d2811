"""Meters of the probes of sweeps: σ₁ by power iteration, sign diversity and Jacobian energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pss.health.representations import sign_diversity, spectral_alignment
from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import gather, stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, canonical_name

# The number of calls of a `SpectralNormMeter` between two restarts.
_RESTART_EVERY = 50
# Rounding of a sum of squares in fp32 may turn an SR of 5 into 4.99999. It
# still means 5 directions.
_ROUNDING = 1e-5


class SpectralNorm(NamedTuple):
    """An estimate of σ₁ from below, and the distance of its vectors from a singular pair."""

    sigma: float
    """In the units of the matrix. It is NaN if the matrix holds NaN or inf."""
    residual: float
    """‖Wᵀu − ‖Wv‖ v‖ / ‖Wᵀu‖ of the vectors before the round. It is NaN if the matrix holds NaN or
    inf. If it is above 0.05, the vectors lag behind the matrix: by Weyl's theorem, some singular
    value lies within residual · σ of the estimate. If it is small, the vectors belong to some
    singular value. Only a restart finds a different value that has become larger."""


class SpectralNormMeter:
    """Tracks σ₁ and v₁ of the selected matrices during training.

    Each call makes one round of power iteration. The first call and every 50th call use
    `leading_triplets` instead, because power iteration that has converged to one singular vector
    never finds a larger one orthogonal to it.

    Cost: light, for every step. There are two products of each matrix with a vector, one batched
    call per shape, and one device-to-host read. The memory is one vector per matrix.

    Args:
        views: The matrices to read.
        backend: How parameters are stored.
    """

    def __init__(self, views: Sequence[MatrixView], backend: Backend) -> None:
        self._views, self._backend = tuple(views), backend
        self._num_calls = 0
        self._vectors: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def measure(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, SpectralNorm]:
        """Do one round, and return the estimate for each 2-D matrix by name."""
        numbers = {}
        restarts = self._num_calls % _RESTART_EVERY == 0
        for stack in stacks(self._views, parameters, self._backend):
            if restarts:
                v = leading_triplets(stack.matrices, 1, check_finite=False).v[..., 0]
            else:
                v = self._vectors[stack.names]
            sigma, self._vectors[stack.names], residual = power_round(stack.matrices, v)
            numbers[stack.names] = torch.stack([sigma, residual], dim=-1)
        self._num_calls += 1
        found = _agreed(numbers, self._backend)
        return {name: SpectralNorm(*pair) for name, pair in found.items()}

    def directions(self) -> dict[str, Tensor]:
        """Return v₁ of each 2-D matrix by name, (n,), as of the last call."""
        return {
            name: v
            for names, stacked in self._vectors.items()
            for name, v in zip(names, stacked, strict=True)
        }


def power_round(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do one round of power iteration: u = Wv / ‖Wv‖, σ = ‖Wᵀu‖, v ← Wᵀu / σ.

    This is the method of Golub & Van Loan, Matrix Computations, section 8.2, applied to WᵀW.

    Args:
        weight: (..., m, n), any real floating dtype.
        v: (..., n), unit vectors, float32, or float64 for a float64 weight.

    Returns:
        Three tensors. The first is σ (...), which is not above σ₁ except for rounding. The second
        is the new v (..., n), or the old v if the matrix is not finite or maps v to zero. The
        third is the residual (...) of the old v, which is 1 if a nonzero matrix maps it to zero.

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


class SignDiversityMeter:
    """Collects the alignments of inputs with v₁ in forward passes, between `arm` and `read`.

    Cost: full, for sampled steps. Each matrix needs one product of the inputs with a vector, and
    one number per token until the end, which needs one device-to-host read. Before `arm` and after
    `read` there are no hooks. Stacks of experts are left out, because no module has their inputs
    separately. A padded token counts like any other token.

    Args:
        model: The model whose linear layers get hooks.
        views: The matrices to read.
        backend: How parameters are stored.
    """

    def __init__(self, model: nn.Module, views: Sequence[MatrixView], backend: Backend) -> None:
        self._backend = backend
        held: dict[str, list[str]] = {}
        for view in views:
            if len(view.shape) == 2:
                held.setdefault(view.parameter_name, []).append(view.name)
        self._modules = [
            (module, names)
            for name, module in model.named_modules()
            if (names := held.get(canonical_name(f"{name}.weight")))
        ]
        self._handles: list[RemovableHandle] = []
        self._seen: dict[tuple[str, ...], list[Tensor]] = {}

    def arm(self, directions: Mapping[str, Tensor]) -> None:
        """Start collecting.

        Args:
            directions: v₁ of each matrix by name, (n,). Matrices without a direction are left out.
        """
        self.disarm()
        for module, names in self._modules:
            known = tuple(name for name in names if name in directions)
            if known:
                v = torch.stack([directions[name] for name in known], dim=-1)
                self._handles.append(module.register_forward_pre_hook(self._listen(known, v)))

    def disarm(self) -> None:
        """Remove the hooks and drop the alignments."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def read(self) -> dict[str, float]:
        """Remove the hooks. Return the sign diversity of each matrix whose layer was applied."""
        seen = self._seen
        self.disarm()
        numbers = {
            names: sign_diversity(torch.cat(found))[:, None] for names, found in seen.items()
        }
        return {name: number for name, (number,) in _agreed(numbers, self._backend).items()}

    def _listen(self, names: tuple[str, ...], v: Tensor) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            cosines = spectral_alignment(x.reshape(-1, x.shape[-1]), v)
            self._seen.setdefault(names, []).append(cosines)

        return hook


def jacobian_energy(weight: Tensor, grad: Tensor, *, max_rank: int = 32) -> Tensor:
    """Return SJE(W) = Σ_{i ≤ k} (u_iᵀ G v_i)² / ‖G‖_F², k = ⌊SR(W)⌋, in [0, 1].

    The quantity comes from arXiv 2602.01308. The projection on pairs (u_i, v_i) and the cap on
    k are ours. A factor on G does not change the result, so clipping has no effect. For a
    gradient of i.i.d. noise the mean of the result is k / mn. If SR(W) exceeds the cap, the
    result is a lower bound.

    Args:
        weight: (..., m, n), any real floating dtype.
        grad: (..., m, n), ∂L/∂W.
        max_rank: The largest k.

    Returns:
        The energy, (...), float32, or float64 for a float64 weight. It is 0 if the weight or the
        gradient is zero, and NaN if either holds NaN or inf.

    >>> jacobian_energy(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)).item()
    0.5
    """
    triplets = leading_triplets(weight, max_rank, check_finite=False)
    scaled, gradient = unit_scaled(weight), unit_scaled(grad)
    sigma1 = triplets.sigma[..., 0] / scaled.scale
    total = scaled.matrix.square().sum(dim=(-2, -1))
    rank = total / torch.where(sigma1 > 0, sigma1.square(), 1.0)
    k = (rank * (1 + _ROUNDING)).floor().clamp_min(1)  # SR ≥ 1 except for rounding
    g = gradient.matrix.to(triplets.u.dtype)
    projected = (triplets.u * (g @ triplets.v)).sum(dim=-2).square()
    dominant = torch.arange(projected.shape[-1], device=k.device) < k.unsqueeze(-1)
    energy = g.square().sum(dim=(-2, -1))
    share = (projected * dominant).sum(dim=-1) / torch.where(energy > 0, energy, 1.0)
    share = torch.where(total > 0, share, 0.0)
    return torch.where(scaled.finite & gradient.finite, share, torch.nan)


@torch.no_grad()
def measure_jacobian_energies(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable Jacobian energy of each 2-D matrix by name, before or after clipping.

    Cost: full, for sampled steps. Each matrix gets a singular value decomposition, which is
    complete up to a side of 128. There is one batched call per shape, and one device-to-host read.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.

    Returns:
        The energies by name. Matrices without a gradient are left out. An energy is NaN if its
        matrix or gradient is not finite.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    numbers = {}
    for stack in stacks(held, parameters, backend):
        grad = gather(stack.refs, grads, backend)
        numbers[stack.names] = jacobian_energy(stack.matrices, grad)[:, None]
    return {name: number for name, (number,) in _agreed(numbers, backend).items()}


def _agreed(
    stacked: Mapping[tuple[str, ...], Tensor], backend: Backend
) -> dict[str, tuple[float, ...]]:
    """Return the rows of (len(names), k) by name on the host, with one read for all of them."""
    if not stacked:
        return {}
    device = next(iter(stacked.values())).device
    every = torch.cat([rows.to(device) for rows in stacked.values()])
    names = [name for group in stacked for name in group]
    host = iter(backend.agree(every.flatten()))
    return dict(zip(names, zip(*[host] * every.shape[1], strict=True), strict=True))


def _nonzero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
