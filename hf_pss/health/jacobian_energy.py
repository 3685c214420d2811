"""Stable Jacobian energy of every selected matrix: the gradient's share on dominant directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import gather, stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["DEFAULT_MAX_RANK", "jacobian_energy", "measure_jacobian_energies"]

DEFAULT_MAX_RANK = 32
# Rounding of a sum of squares in fp32 may turn an SR of 5 into 4.99999. It
# still means 5 directions.
_ROUNDING = 1e-5


def jacobian_energy(weight: Tensor, grad: Tensor, *, max_rank: int = DEFAULT_MAX_RANK) -> Tensor:
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
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    *,
    max_rank: int = DEFAULT_MAX_RANK,
) -> dict[str, float]:
    """Return the stable Jacobian energy of each 2-D matrix by name, before or after clipping.

    Cost: full, for sampled steps. Each matrix gets a singular value decomposition, which is
    complete up to a side of 128. There is one batched call per shape, and one device-to-host read.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        max_rank: The largest number of dominant directions.

    Returns:
        The energies by name. Matrices without a gradient are left out. An energy is NaN if its
        matrix or gradient is not finite.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    names: list[str] = []
    shares = []
    for stack in stacks(held, parameters, backend):
        names += stack.names
        grad = gather(stack.refs, grads, backend)
        shares.append(jacobian_energy(stack.matrices, grad, max_rank=max_rank))
    if not shares:
        return {}
    device = shares[0].device
    return dict(zip(names, backend.agree(torch.cat([s.to(device) for s in shares])), strict=True))
