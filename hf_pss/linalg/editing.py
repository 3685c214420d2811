"""Smoothing of the leading singular values of matrices, W* = W + U(φ(Σ) − Σ)Vᵀ.

A LoRA product s·B·A is smoothed by an edit of both factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.norms import spectral_norm
from hf_pss.linalg.scaling import require_finite, unit_scaled
from hf_pss.linalg.smoothing import SmoothingFunction, Spectrum
from hf_pss.linalg.triplets import Triplets, triplets_of_scaled

# If the space of the triplets leaves σ₁ within this share of φ's level, σ₁ of the edited matrix is
# read from that space. Otherwise the triplets have not converged, and σ₁ is measured.
_CONVERGED = 1e-3
# The edit leaves equal leading values, and for these the iteration converges slowest. After `Clip`
# on 24 matrices of SmolLM2-135M, 4 rounds from the vectors of that space left σ₁ too low by at most
# 0.42 %, and 12 rounds from 4 random vectors by 0.43 %. On noise it is 0.5 %, and the time a half.
_MEASURING_ROUNDS = 4


class SmoothingStatus(IntEnum):
    """The effect of smoothing on a matrix."""

    UNCHANGED = 0
    """φ asks for no change above rounding, so the matrix is returned bit for bit."""
    SMOOTHED = 1
    """The leading values of the matrix were moved."""
    TRUNCATED = 2
    """The values were moved, but only down to the last computed value. A larger max_rank could
    lower them further."""
    RANK_DEFICIENT = 3
    """The matrix was left alone. Its reference level is zero to rounding, so
    smoothing would erase it."""


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Matrices after `smooth_spectrum`, and the changes of their spectra."""

    weight: Tensor
    """(..., m, n), new memory with the dtype of the input."""
    u: Tensor
    """(..., m, K), left singular vectors in columns."""
    sigma_before: Tensor
    """(..., K), leading singular values, descending."""
    sigma_after: Tensor
    """(..., K), their new values: `sigma_target` times `gain`."""
    sigma_target: Tensor
    """(..., K), φ(Σ). A value that is not moved equals `sigma_before` bit for bit."""
    gain: Tensor
    """(...): the factor on the whole matrix after the edit. It is 1 unless ‖W‖_F is kept."""
    v: Tensor
    """(..., n, K), right singular vectors in columns."""
    rank: Tensor
    """(...) int64: k, the number of values that counted as dominant."""
    stable_rank_before: Tensor
    """(...). It is 0 for the zero matrix."""
    spectral_norm_after: Tensor
    """(...): σ₁ of the edited weight, measured from below (see `smooth_spectrum`). It is above
    sigma_after[0] if the iteration missed a part of the spectrum."""
    stable_rank_after: Tensor
    """(...): the stable rank of the edited weight, computed with that σ₁."""
    changed: Tensor
    """(...) bool."""
    status: Tensor
    """(...) int64: one `SmoothingStatus` for each matrix."""
    finite: Tensor
    """(...) bool. It is False if the matrix held NaN or inf."""


def smooth_spectrum(
    weight: Tensor,
    phi: SmoothingFunction,
    *,
    max_rank: int = 32,
    keep_frobenius: bool = False,
    check_finite: bool = True,
) -> Smoothed:
    """Smooth the dominant singular values: W* = W + U_k (φ(Σ_k) − Σ_k) V_kᵀ (arXiv 2602.01308).

    k is ⌊SR(W)⌋, limited to [1, min(max_rank, r − 1)] with r = min(m, n). [ours] The reference
    level is σ_{k+1}. If the reference level of a matrix is zero to rounding, the matrix is left
    alone, and its status records this. This applies to rank-deficient, zero, 1×n and n×1 matrices.
    No value is lowered below the last computed one, σ_{max_rank+1}. Otherwise the values below it,
    which are unknown, would become the largest.

    Above min(m, n) = 128 the triplets are iterated. Even then, a φ that raises no value raises no
    singular value of W, to rounding (4e-9 σ₁ measured), because the edit is W times a contraction.
    But σ₁ may stay above φ's level. After `Clip` with 33 values it was above the exact σ_33 by 4 %
    on noise at 768×768, by 2 % on noise at 256×256, and by 0.2 % on σ_i ∝ i^-0.15. So
    `spectral_norm_after` includes what the triplets leave outside (see `RitzSpace`). If this is
    more than 0.1 %, σ₁ is measured on the edited matrix by a second iteration, which starts from
    that space. On these spectra it is too low by at most 0.5 %. `stable_rank_after` is too high by
    twice that.

    Args:
        weight: (..., m, n), any real floating dtype. It is not changed. The edit is computed in
            float32 (float64 for float64), added once and rounded once.
        phi: The smoothing function; see `SMOOTHING_FUNCTIONS`.
        max_rank: The largest number of values that may move. A φ of the whole
            spectrum has no such limit.
        keep_frobenius: Whether to rescale each changed matrix to its previous ‖W‖_F.
        check_finite: Whether to raise on NaN and inf, which costs one device-to-host read.

    Raises:
        NonFiniteError: A matrix holds NaN or inf, and check_finite is true.
        ConfigurationError: max_rank is below 1, or `leading_triplets` rejects an argument.

    >>> from hf_pss.linalg import Clip
    >>> smooth_spectrum(torch.diag(torch.tensor([9.0, 2.0, 1.0])), Clip()).weight.diag().tolist()
    [2.0, 2.0, 1.0]
    """
    if max_rank < 1:
        raise ConfigurationError(f"You gave max_rank={max_rank}; give 1 or more.")
    m, n = weight.shape[-2:] if weight.ndim >= 2 else (0, 0)
    size = min(m, n)
    num_values = max(1, size if phi.whole_spectrum else min(max_rank + 1, size))
    scaled = unit_scaled(weight)
    if check_finite:
        require_finite(scaled)
    triplets = triplets_of_scaled(scaled, num_values)
    tail = scaled.restore(_tail(scaled.matrix, triplets))
    triplets = replace(triplets, sigma=scaled.restore(triplets.sigma))
    matrix, finite = weight.detach().to(triplets.sigma.dtype), scaled.finite
    del scaled
    plan = plan_values(
        triplets.sigma, tail, phi, max_rank=max_rank, keep_frobenius=keep_frobenius, shape=(m, n)
    )
    sigma, after, gain, changed = triplets.sigma, plan.after, plan.gain, plan.changed

    edited = _plus_product(matrix, triplets.u * (after - sigma).unsqueeze(-2), triplets.v)
    if keep_frobenius:
        edited *= gain[..., None, None]
    edited = edited.to(weight.dtype)
    if not bool(changed.all()):
        edited = torch.where(changed[..., None, None], edited, weight.detach())
    values_after = after * gain.unsqueeze(-1)
    largest = values_after[..., 0]
    if triplets.space is not None:
        measured, vectors = triplets.space.norm_after(sigma, after)
        measured = measured * gain
        doubtful = changed & (measured > (1 + _CONVERGED) * largest)
        if bool(doubtful.any()):
            measured[doubtful] = spectral_norm(
                edited[doubtful], num_rounds=_MEASURING_ROUNDS, start=vectors[doubtful]
            )
        largest = torch.where(changed, torch.maximum(measured, largest), largest)
    return Smoothed(
        weight=edited,
        u=triplets.u,
        sigma_before=sigma,
        sigma_after=values_after,
        sigma_target=after,
        gain=gain,
        v=triplets.v,
        rank=plan.rank,
        stable_rank_before=_stable_rank(sigma, tail),
        spectral_norm_after=largest,
        stable_rank_after=_stable_rank(values_after, tail * gain, largest),
        changed=changed,
        status=plan.status,
        finite=finite,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """The new singular values of matrices, before the matrices are edited."""

    after: Tensor
    """(..., K), φ(Σ). In an unchanged matrix it equals Σ bit for bit."""
    gain: Tensor
    """(...), the factor on the whole matrix after the edit."""
    rank: Tensor
    """(...) int64: k."""
    changed: Tensor
    """(...) bool."""
    status: Tensor
    """(...) int64: one `SmoothingStatus` for each matrix."""


def plan_values(
    sigma: Tensor,
    tail: Tensor,
    phi: SmoothingFunction,
    *,
    max_rank: int,
    keep_frobenius: bool,
    shape: tuple[int, int],
) -> Plan:
    """Apply φ to leading singular values, within the limits that `smooth_spectrum` describes.

    Args:
        sigma: (..., K), descending.
        tail: (...), the Frobenius norm of the remaining spectrum.
        phi: The smoothing function.
        max_rank: The largest number of values that may count as dominant.
        keep_frobenius: Whether to choose a gain that restores ‖W‖_F.
        shape: The shape (m, n) of the matrix.
    """
    num_values = sigma.shape[-1]
    rank = _stable_rank(sigma, tail).floor().to(torch.int64)
    rank = rank.clamp(1, max(1, min(max_rank, num_values - 1)))
    spectrum = Spectrum(sigma, rank, tail, shape)
    after = phi(spectrum)
    is_partial = num_values < min(shape)
    if is_partial:
        after = torch.maximum(after, sigma[..., -1:])
    rounding = spectrum.rounding
    deficient = ((spectrum.reference <= rounding) | (after[..., :1] <= rounding)).squeeze(-1)
    changed = ((after - sigma).abs() > rounding).any(dim=-1) & ~deficient
    after = torch.where(changed.unsqueeze(-1), after, sigma)
    gain = torch.ones_like(tail)
    if keep_frobenius:
        before_to_after = spectrum.frobenius / replace(spectrum, sigma=after).frobenius
        gain = torch.where(changed, before_to_after, 1.0)
    status = changed.to(torch.int64) * SmoothingStatus.SMOOTHED
    if is_partial:
        down_to_last = changed & (after[..., 0] <= sigma[..., -1])
        status = torch.where(down_to_last, int(SmoothingStatus.TRUNCATED), status)
    status = torch.where(deficient, int(SmoothingStatus.RANK_DEFICIENT), status)
    return Plan(after, gain, rank, changed, status)


def _tail(matrix: Tensor, triplets: Triplets) -> Tensor:
    """Return ‖W − UΣVᵀ‖_F of matrices of unit scale.

    For a collapsed matrix ‖W‖_F² − Σσ² would be only rounding.
    """
    u, sigma, v = triplets.u, triplets.sigma, triplets.v
    if sigma.shape[-1] == min(matrix.shape[-2:]):
        return torch.zeros_like(sigma[..., 0])
    rest = _plus_product(matrix, u * -sigma.unsqueeze(-2), v)
    norm: Tensor = torch.linalg.vector_norm(rest, dim=(-2, -1))
    return norm


def _plus_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return W + L Rᵀ, (..., m, n), without a second matrix of that size in memory."""
    m, n = matrix.shape[-2:]
    flat = torch.baddbmm(
        matrix.reshape(-1, m, n),
        left.reshape(-1, m, left.shape[-1]),
        right.mT.reshape(-1, right.shape[-1], n),
    )
    return flat.reshape(matrix.shape)


def _stable_rank(values: Tensor, tail: Tensor, largest: Tensor | None = None) -> Tensor:
    """Return (Σσ*² + tail²) / σ₁² = (‖W‖_F² − Σ(σ² − σ*²)) / σ₁². σ₁ is σ*₁ unless it is given."""
    largest = values[..., :1] if largest is None else largest.unsqueeze(-1)
    unit = torch.where(largest > 0, largest, 1.0)
    ratios = torch.cat([values, tail.unsqueeze(-1)], dim=-1) / unit
    return torch.where(largest > 0, ratios.square(), 0.0).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class SmoothedProduct:
    """The factors after `smooth_product`, and the changes of their product's spectrum."""

    left: Tensor
    """(..., m, r): B*, with the dtype of the input."""
    right: Tensor
    """(..., r, n): A*."""
    sigma_before: Tensor
    """(..., K), all singular values of s·B·A, descending. K is min(r, m, n)."""
    sigma_after: Tensor
    """(..., K), the singular values of s·B*·A* before rounding."""
    rank: Tensor
    """(...) int64: k, the number of values that counted as dominant."""
    status: Tensor
    """(...) int64: one `SmoothingStatus` for each product."""


def product_triplets(left: Tensor, right: Tensor, scaling: float = 1.0) -> Triplets:
    """Return all singular triplets of s·B·A, exactly, without forming the m × n product.

    With B = Q_B R_B and Aᵀ = Q_A R_A, the r × r matrix s R_B R_Aᵀ = U' Σ V'ᵀ gives U = Q_B U' and
    V = Q_A V'. The cost is O((m + n) r²). See Golub & Van Loan, Matrix Computations, 4th ed.,
    § 8.6.3 (product SVD by factors).

    Args:
        left: (..., m, r): B, any real floating dtype. Computed in float32, or float64 for float64.
        right: (..., r, n): A.
        scaling: s, which may have either sign.

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
    return Triplets(u=u, sigma=sigma, v=v, space=None)


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

    Let ρ_i = φ(σ)_i / σ_i. The new factors are [ours]

        B* = B − U diag(1 − √ρ) Uᵀ B,    A* = A − A V diag(1 − √ρ) Vᵀ

    Then s·B*·A* = U φ(Σ) Vᵀ, exactly. On a logarithmic scale, each factor takes half of the change.
    An edit of only B would leave A as large as before. The gradient of B is proportional to A, so
    it would also stay as large as before.

    A product that is zero (LoRA starts at B = 0), of rank one, or not finite
    is returned bit for bit.

    Args:
        left: (..., m, r): B, any real floating dtype. It is not changed.
        right: (..., r, n): A.
        phi: The smoothing function. It gets the whole spectrum, and k is ⌊SR⌋ limited to [1,
            min(max_rank, K − 1)].
        scaling: s.
        max_rank: The largest number of values that may count as dominant.
        keep_frobenius: Whether to rescale a changed product to its previous Frobenius norm.
    """
    triplets = product_triplets(left, right, scaling)
    finite = triplets.sigma.isfinite().all(dim=-1)
    sigma = torch.where(finite.unsqueeze(-1), triplets.sigma, 0.0)
    # These are all singular values of the product, so the rest of the spectrum is empty.
    none_left = torch.zeros_like(sigma[..., 0])
    shape = (max(left.shape[-2], right.shape[-1]), sigma.shape[-1])
    plan = plan_values(
        sigma, none_left, phi, max_rank=max_rank, keep_frobenius=keep_frobenius, shape=shape
    )
    after = plan.after * plan.gain.unsqueeze(-1)
    # Values of zero stay zero.
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
        status=plan.status,
    )
