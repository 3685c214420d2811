"""A matrix given as a product s·B·A, as LoRA has it: its triplets, and edits of both factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.linalg.editing import plan_values, status_of
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.linalg.smoothing import SmoothingFunction
from hf_pss.linalg.triplets import Triplets

__all__ = ["SmoothedProduct", "product_triplets", "smooth_product"]


@dataclass(frozen=True, slots=True)
class SmoothedProduct:
    """Factors after `smooth_product`, and what was done to their product."""

    left: Tensor
    """(..., m, r): B*, dtype of the input."""
    right: Tensor
    """(..., r, n): A*."""
    sigma_before: Tensor
    """(..., K), all singular values of s·B·A, descending; K = min(r, m, n)."""
    sigma_after: Tensor
    """(..., K), those of s·B*·A*, before rounding."""
    rank: Tensor
    """(...) int64: k, how many values counted as dominant."""
    changed: Tensor
    """(...) bool."""
    status: Tensor
    """(...) int64: a `SmoothingStatus` each."""


def product_triplets(left: Tensor, right: Tensor, scaling: float = 1.0) -> Triplets:
    """Return all singular triplets of s·B·A, exactly, without forming the m × n product.

    B = Q_B R_B and Aᵀ = Q_A R_A; the r × r matrix s R_B R_Aᵀ = U' Σ V'ᵀ gives U = Q_B U' and
    V = Q_A V'. O((m + n) r²). Golub & Van Loan, Matrix Computations, 4th ed., § 8.6.3 (product SVD
    by factors).

    Args:
        left: (..., m, r): B, any real floating dtype; computed in float32, float64 for float64.
        right: (..., r, n): A.
        scaling: s, of either sign.

    >>> b, a = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]])
    >>> product_triplets(b, a, 0.5).sigma.tolist()
    [3.0]
    """
    b, a = unit_scaled(left), unit_scaled(right)
    q_left, r_left = torch.linalg.qr(b.matrix)
    q_right, r_right = torch.linalg.qr(a.matrix.mT)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    u, v = q_left @ u, q_right @ vh.mT
    if scaling < 0:
        u = -u
    sigma = b.restore(a.restore(sigma)) * abs(scaling)
    return Triplets(u=u, sigma=sigma, v=v, residual=sigma * 0.0, is_exact=True)


def smooth_product(
    left: Tensor,
    right: Tensor,
    phi: SmoothingFunction,
    *,
    scaling: float = 1.0,
    max_rank: int = 32,
    keep_frobenius: bool = False,
) -> SmoothedProduct:
    """Smooth the dominant singular values of s·B·A by an edit of both factors.

    With ρ_i = φ(σ)_i / σ_i, [ours]

        B* = B − U diag(1 − √ρ) Uᵀ B,    A* = A − A V diag(1 − √ρ) Vᵀ

    and s·B*·A* = U φ(Σ) Vᵀ, exactly. Both factors take half, in the logarithm: an edit of B alone
    would leave A as large as it was, and B's gradient, which is proportional to A, with it.

    A product that is zero (LoRA starts at B = 0), of rank one, or not finite is returned bit for
    bit.

    Args:
        left: (..., m, r): B, any real floating dtype; not changed.
        right: (..., r, n): A.
        phi: The smoothing function; it sees the whole spectrum, k = ⌊SR⌋ within
            [1, min(max_rank, K − 1)].
        scaling: s.
        max_rank: How many values may count as dominant.
        keep_frobenius: Rescale a changed product to the Frobenius norm it had.
    """
    triplets = product_triplets(left, right, scaling)
    finite = triplets.sigma.isfinite().all(dim=-1)
    sigma = torch.where(finite.unsqueeze(-1), triplets.sigma, 0.0)
    # All that there is of the product: nothing is left behind the values, and none is the last of
    # those at hand.
    none_left = torch.zeros_like(sigma[..., 0])
    shape = (max(left.shape[-2], right.shape[-1]), sigma.shape[-1])
    plan = plan_values(
        sigma, none_left, phi, max_rank=max_rank, keep_frobenius=keep_frobenius, shape=shape
    )
    after = plan.after * plan.gain.unsqueeze(-1)
    # What is zero stays zero.
    root = torch.where(sigma > 0, after / torch.where(sigma > 0, sigma, 1.0), 1.0).sqrt()
    lost = (1 - root).unsqueeze(-2)
    u, v = triplets.u, triplets.v
    b, a = left.detach().to(u.dtype), right.detach().to(u.dtype)
    new_left = b - (u * lost) @ (u.mT @ b)
    new_right = a - (a @ (v * lost)) @ v.mT
    kept = plan.changed[..., None, None]
    return SmoothedProduct(
        left=torch.where(kept, new_left.to(left.dtype), left.detach()),
        right=torch.where(kept, new_right.to(right.dtype), right.detach()),
        sigma_before=triplets.sigma,
        sigma_after=torch.where(finite.unsqueeze(-1), after, torch.nan),
        rank=plan.rank,
        changed=plan.changed,
        status=status_of(plan.deficient, plan.changed, torch.zeros_like(plan.changed)),
    )
