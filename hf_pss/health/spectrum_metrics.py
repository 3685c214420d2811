"""Metrics of complete spectra: singular values, effective rank, distance to low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import frobenius_norm, quick_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import matrix_shapes, measure_each, measure_rows
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = [
    "effective_rank_of",
    "low_rank_distance",
    "measure_low_rank_distances",
    "measure_spectra",
    "quick_low_rank_distance",
]

# The number of triplets beyond K. In our measurement 8 was the best of 0, 4 and 8.
_SPARE = 8


@torch.no_grad()
def measure_spectra(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, tuple[float, ...]]:
    """Return the singular values of each 2-D matrix by name, descending. Broken matrices give NaN.

    Cost: full, for sampled steps. One rank decomposes each matrix. All ranks get the values in one
    device-to-host read for the whole model.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.

    Raises:
        DecompositionError: A decomposition failed on some rank.
        ElsewhereError: A different error occurred on another rank, which raises it.
    """
    lengths = {name: min(shape) for name, shape in matrix_shapes(views).items()}
    longest = max(lengths.values(), default=0)

    def values(matrices: Tensor) -> Tensor:
        scaled = unit_scaled(matrices)
        sigma = scaled.restore(torch.linalg.svdvals(scaled.matrix))
        return functional.pad(sigma, (0, longest - sigma.shape[-1]))

    rows = measure_rows(views, parameters, backend, values, width=longest)
    return {name: row[: lengths[name]] for name, row in rows.items()}


def effective_rank_of(sigmas: Sequence[float]) -> float:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i / Σσ of a complete spectrum.

    The formula is that of Roy & Vetterli 2007, EUSIPCO. The result is in [1, min(m, n)], without
    unit. It is 0 for the zero matrix and NaN if one value is NaN, as in
    `hf_pss.linalg.effective_rank`.

    >>> round(effective_rank_of([2.0, 2.0, 0.0]), 12)
    2.0
    """
    total = math.fsum(sigmas)
    if not 0 < total < math.inf:
        return 0.0 if total == 0 else math.nan
    shares = (sigma / total for sigma in sigmas)
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


def low_rank_distance(weight: Tensor, k: int) -> Tensor:
    """Return (Σ_{i>K} σ_i²)^½ / ‖W‖_F, in [0, 1].

    By Eckart & Young 1936 the numerator is the distance, in the Frobenius norm, to the nearest
    matrix of rank K. arXiv 2402.03991 bounds that distance for trained networks, where K is the
    number of classes. The division by the norm and the free choice of K are ours.

    Args:
        weight: (..., m, n), any real floating dtype.
        k: K, at least 1. If K is min(m, n) or more, the result is 0.

    Returns:
        The distance, (...), float32, or float64 for a float64 weight. It is 0 for the zero matrix,
        and NaN if the matrix holds NaN or inf. Values below about 1e-6 (float32) are rounding.

    Raises:
        ConfigurationError: `k` is below 1.

    >>> low_rank_distance(torch.diag(torch.tensor([4.0, 3.0])), 1).item()
    0.6000000238418579
    """
    _check(k)
    scaled = unit_scaled(weight)
    sigma = torch.linalg.svdvals(scaled.matrix)
    rest = torch.linalg.vector_norm(sigma[..., k:], dim=-1)
    return _share(rest, torch.linalg.vector_norm(sigma, dim=-1), scaled.finite)


def quick_low_rank_distance(weight: Tensor, k: int) -> Tensor:
    """Return an upper bound of `low_rank_distance` from a few products with a narrow block.

    The bound uses K + 8 triplets of `quick_triplets`, whose remainder is measured, not computed by
    subtraction. We tested noise and spectra σ_i ∝ i^-p with p from 0.2 to 2, K up to 16 and sides
    from 16 to 768. The bound exceeded the distance by at most 0.014, or 1.9 % of it. (With only K
    triplets it would exceed it by up to 0.30, if one triplet is missed.) The function does not read
    from the device.

    Args:
        weight: (..., m, n), any real floating dtype.
        k: K, as in `low_rank_distance`.

    Raises:
        ConfigurationError: `k` is below 1.

    >>> quick_low_rank_distance(torch.diag(torch.tensor([4.0, 3.0])), 2).item() < 1e-6
    True
    """
    _check(k)
    scaled = unit_scaled(weight)
    triplets, rest = quick_triplets(scaled.matrix, k + _SPARE)
    # The values beyond K are orthogonal to the remainder.
    tail = torch.linalg.vector_norm(triplets.sigma[..., k:], dim=-1)
    return _share(torch.hypot(rest, tail), frobenius_norm(scaled.matrix), scaled.finite)


@torch.no_grad()
def measure_low_rank_distances(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    k: int,
    *,
    exact: bool = False,
) -> dict[str, float]:
    """Return the relative distance to rank K of each 2-D matrix by name.

    Cost: full, for sampled steps. It costs twice as much as the stable rank, or as much as the
    effective rank with `exact`. There is one batched call per shape, and one device-to-host read.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        k: K, the same for all matrices.
        exact: Compute every singular value instead of the upper bound.
    """
    _check(k)
    distance: Callable[[Tensor, int], Tensor]
    distance = low_rank_distance if exact else quick_low_rank_distance
    return measure_each(views, parameters, backend, lambda stack: distance(stack, k))


def _check(k: int) -> None:
    if k < 1:
        raise ConfigurationError(f"You gave k={k} as the rank to measure from; give 1 or more.")


def _share(rest: Tensor, whole: Tensor, finite: Tensor) -> Tensor:
    share = (rest / torch.where(whole > 0, whole, 1.0)).clamp_max(1.0)
    return torch.where(finite, share, torch.nan)
