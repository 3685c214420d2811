"""Stable Jacobian energy of every selected matrix: the gradient's share on dominant directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["DEFAULT_MAX_RANK", "jacobian_energy", "measure_jacobian_energies"]

DEFAULT_MAX_RANK = 32
# An SR of 5 computed as 4.99999 is five directions: fp32 rounding of a sum of squares.
_ROUNDING = 1e-5


def jacobian_energy(weight: Tensor, grad: Tensor, *, max_rank: int = DEFAULT_MAX_RANK) -> Tensor:
    """Return SJE(W) = Σ_{i ≤ k} (u_iᵀ G v_i)² / ‖G‖_F², k = ⌊SR(W)⌋, in [0, 1].

    The quantity comes from arXiv 2602.01308. The projection on pairs (u_i, v_i) and the cap on k
    are ours. A factor on G, such as that of clipping, does not change it. On a gradient of i.i.d.
    noise its mean is k / mn. If SR(W) exceeds the cap, the result is a lower bound.

    Args:
        weight: (..., m, n), any real floating dtype.
        grad: (..., m, n), ∂L/∂W.
        max_rank: The largest k.

    Returns:
        (...), float32, or float64 for a float64 weight: 0 for a zero weight or gradient, NaN if
        either holds NaN or inf.

    >>> jacobian_energy(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)).item()
    0.5
    """
    triplets = leading_triplets(weight, max_rank, check_finite=False)
    scaled, gradient = unit_scaled(weight), unit_scaled(grad)
    sigma1 = triplets.sigma[..., 0] / scaled.scale
    total = scaled.matrix.square().sum(dim=(-2, -1))
    rank = total / torch.where(sigma1 > 0, sigma1.square(), 1.0)
    k = (rank * (1 + _ROUNDING)).floor().clamp_min(1)  # SR ≥ 1 but for rounding
    g = gradient.matrix.to(triplets.u.dtype)
    projected = (triplets.u * (g @ triplets.v)).sum(dim=-2).square()
    dominant = torch.arange(projected.shape[-1], device=k.device) < k.unsqueeze(-1)
    energy = g.square().sum(dim=(-2, -1))
    share = (projected * dominant).sum(dim=-1) / torch.where(energy > 0, energy, 1.0)
    share = torch.where(total > 0, share, 0.0)
    return torch.where(scaled.finite & gradient.finite, share, torch.nan)


@torch.no_grad()
def measure_jacobian_energies(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    *,
    max_rank: int = DEFAULT_MAX_RANK,
) -> dict[str, float]:
    """Return the stable Jacobian energy of each 2-D matrix by name, before or after clipping.

    Cost: full, for sampled steps. A singular value decomposition of each matrix, whole up to a
    side of 128; one batched call a shape, and one device-to-host read.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        max_rank: The largest number of dominant directions.

    Returns:
        Shares by name. Matrices without a gradient are left out; a share is NaN if its matrix or
        gradient is not finite.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    names: list[str] = []
    shares = []
    # Gradients have the shapes, dtypes and devices of their parameters, so their stacks match.
    both = zip(stacks(held, parameters, backend), stacks(held, grads, backend), strict=True)
    for weight, grad in both:
        names += weight.names
        shares.append(jacobian_energy(weight.matrices, grad.matrices, max_rank=max_rank))
    if not shares:
        return {}
    device = shares[0].device
    return dict(zip(names, backend.agree(torch.cat([s.to(device) for s in shares])), strict=True))
