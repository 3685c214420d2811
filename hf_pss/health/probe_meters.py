"""Meters of the probes of sweeps: sign diversity and stable Jacobian energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pss.health.representations import sign_diversity, spectral_alignment
from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import gather, stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, canonical_name

# Rounding of a sum of squares in fp32 may turn an SR of 5 into 4.99999. It
# still means 5 directions.
_ROUNDING = 1e-5


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
