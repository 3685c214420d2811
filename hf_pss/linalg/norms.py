"""Norms of weight matrices and ranks derived from them, in exact and in quick versions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.scaling import UnitScaled, unit_scaled
from hf_pss.linalg.triplets import cold_start, krylov_space, product

# A block of 4 columns and five multiplications by WᵀW. Of all variants these had the smallest error
# at equal time (2026-11-20, torch 2.13, 1 thread). The others were different blocks, plain power
# iteration, squaring WᵀW, and eigvalsh.
_BLOCK = 4
QUICK_ROUNDS = 5
# After 6 squarings any other eigenvalue has the weight (λ_i/λ_1)^128.
_NUM_SQUARINGS = 6
# Up to this size, squaring WᵀW is faster than a Krylov space. For 16 × 256×64 it takes 1.0 ms, and
# the space takes 2.1 ms.
_SMALL = 64


def frobenius_norm(weight: Tensor) -> Tensor:
    """Return ‖W‖_F = √Σ w², accurate at any scale.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix that holds NaN or inf gives NaN.

    Returns:
        (...), float32, or float64 for float64.

    >>> frobenius_norm(torch.tensor([[3.0, 4.0]]) * 2.0**100).item() / 2.0**100
    5.0
    """
    scaled = unit_scaled(weight)
    return scaled.restore(_frobenius(scaled))


def spectral_norm(
    weight: Tensor, *, num_rounds: int | None = None, start: Tensor | None = None
) -> Tensor:
    """Return σ₁, either exactly or from below by block Krylov iteration.

    The iteration returns the Rayleigh–Ritz value of W on the Krylov space span{X, (WᵀW)X, …,
    (WᵀW)^q X} with a fixed random block X of four columns (Musco & Musco 2015, arXiv 1504.05477,
    algorithm 2). It does not read from the device.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix that holds NaN or inf gives NaN.
        num_rounds: q, the number of multiplications by WᵀW. A larger number is more exact. If
            min(m, n) <= 64, the space is complete for any q. None means the exact value by SVD,
            which reads LAPACK's status from a CUDA device.
        start: (..., max(m, n), b), finite guesses for singular vectors of the longer side. Their
            products with the matrix replace X.

    Returns:
        The norm, (...), float32, or float64 for float64. The iterated value is never above σ₁
        except for rounding.

    Raises:
        ConfigurationError: num_rounds is below 1, or the start has the wrong shape.

    >>> spectral_norm(torch.diag(torch.tensor([3.0, 2.0]))).item()
    3.0
    """
    scaled = unit_scaled(weight)
    return scaled.restore(_spectral(scaled, num_rounds, start))


def stable_rank(weight: Tensor, *, num_rounds: int | None = None) -> Tensor:
    """Return SR(W) = ‖W‖_F² / σ₁², in [1, min(m, n)].

    The zero matrix has no leading direction, so the result for it is 0. A floor
    relative to 0 never fires.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix that holds NaN or inf gives NaN.
        num_rounds: As in `spectral_norm`. The iterated result is never below
            SR except for rounding.

    Returns:
        The stable rank, (...), float32, or float64 for float64.

    >>> stable_rank(torch.eye(5)).item()
    5.0
    """
    scaled = unit_scaled(weight)
    sigma1 = _spectral(scaled, num_rounds)
    ratio = _frobenius(scaled) / torch.where(sigma1 > 0, sigma1, 1.0)
    return torch.where(scaled.finite, ratio.square(), torch.nan)


def quick_stable_rank(weight: Tensor) -> Tensor:
    """Return SR(W) from above in five rounds, without a device-to-host read.

    The function is cheap enough for a call every few steps.

    On i.i.d. noise, which is the hardest spectrum, the result exceeds SR by at most 0.3 % up to
    min(m, n) = 64, and by at most 4 % at 768×768. If σ₁ stands out, it exceeds SR only by rounding.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix that holds NaN or inf gives NaN.

    Returns:
        The stable rank, (...), float32, or float64 for float64.

    >>> quick_stable_rank(torch.zeros(3, 2)).item()
    0.0
    """
    return stable_rank(weight, num_rounds=QUICK_ROUNDS)


def effective_rank(weight: Tensor) -> Tensor:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i / Σσ (Roy & Vetterli 2007, EUSIPCO).

    Args:
        weight: (..., m, n), any real floating dtype. A matrix that holds NaN or inf gives NaN.

    Returns:
        The rank, (...), float32, or float64 for float64. It is 0 for the zero
        matrix, as in `stable_rank`.

    >>> round(effective_rank(torch.eye(4)).item(), 4)
    4.0
    """
    scaled = unit_scaled(weight)
    sigma = torch.linalg.svdvals(scaled.matrix)
    total = sigma.sum(dim=-1)
    p = sigma / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    rank = torch.where(total > 0, torch.special.entr(p).sum(dim=-1).exp(), 0.0)
    return torch.where(scaled.finite, rank, torch.nan)


def noise_stable_rank(m: int, n: int) -> float:
    """Return mn / (√m + √n)², the stable rank of a large m×n matrix of i.i.d. noise.

    The formula uses ‖W‖_F² ≈ mn and σ₁ ≈ √m + √n for unit variance (Bai & Yin 1993).

    >>> noise_stable_rank(64, 64)
    16.0
    """
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2


def _frobenius(scaled: UnitScaled) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(scaled.matrix, dim=(-2, -1))
    return norm


def _spectral(scaled: UnitScaled, num_rounds: int | None, start: Tensor | None = None) -> Tensor:
    if num_rounds is None:
        sigma: Tensor = torch.linalg.svdvals(scaled.matrix)
        return sigma[..., 0]
    if num_rounds < 1:
        raise ConfigurationError(
            f"You gave num_rounds={num_rounds}; give 1 or more, or None for the exact value."
        )
    weight = scaled.matrix
    expected = (*weight.shape[:-2], max(weight.shape[-2:]))
    if start is not None and (start.ndim != weight.ndim or start.shape[:-1] != expected):
        raise ConfigurationError(
            f"You gave a start of shape {tuple(start.shape)} for matrices of shape "
            f"{tuple(weight.shape)}; give shape {(*expected, 'b')}."
        )
    tall = weight if weight.shape[-2] >= weight.shape[-1] else weight.mT
    y = tall
    if tall.shape[-1] > _SMALL:
        block = (
            cold_start(tall, _BLOCK) if start is None else product(tall.mT, start.to(tall.dtype))
        )
        _, y, _ = krylov_space(tall, block, num_rounds)
    return _largest_eigenvalue(y.mT @ y).sqrt()


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return λ_max of a small positive semi-definite matrix, without the host read of eigvalsh."""
    power = _unit_trace(gram)
    for _ in range(_NUM_SQUARINGS):
        power = _unit_trace(power @ power)
    # ⟨P, GP⟩ / ⟨P, P⟩ with P = G^64 is a mean of the eigenvalues, so it is never above λ_max.
    return (power * (gram @ power)).sum(dim=(-2, -1)) / _nonzero(power.square().sum(dim=(-2, -1)))


def _unit_trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return matrix / _nonzero(trace)[..., None, None]


def _nonzero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
