"""Metrics of decompositions: singular values, effective rank, low rank, alignment of neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_pss.linalg import frobenius_norm, leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import (
    matrix_shapes,
    measure_each,
    measure_rows,
    raise_together,
    stacks,
)
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

# The number of triplets beyond K, and the rounds that find them. Not compared with other numbers.
_SPARE, _ROUNDS = 8, 4


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
    """Return an upper bound on (Σ_{i>K} σ_i²)^½ / ‖W‖_F, in [0, 1], from a few block products.

    By Eckart & Young 1936 the numerator is the distance, in the Frobenius norm, to the nearest
    matrix of rank K. arXiv 2402.03991 bounds that distance for trained networks, where K is the
    number of classes. The division by the norm and the free choice of K are ours.

    The bound uses K + 8 triplets of `leading_triplets`. The norm of the remainder is that of the
    matrix W − UΣVᵀ, because for a collapsed matrix ‖W‖_F² − Σσ² would be only rounding. We tested
    noise and spectra σ_i ∝ i^-p with p from 0.2 to 2, K up to 16 and sides from 16 to 768. The
    bound exceeded the distance by at most 0.0018, or 0.18 % of it. The function does not read from
    the device.

    Args:
        weight: (..., m, n), any real floating dtype.
        k: K, at least 1.

    Returns:
        The distance, (...), float32, or float64 for float64. It is 0 for the zero matrix, and NaN
        if the matrix holds NaN or inf.

    >>> low_rank_distance(torch.diag(torch.tensor([4.0, 3.0])), 2).item() < 1e-6
    True
    """
    scaled = unit_scaled(weight)
    top = leading_triplets(scaled.matrix, k + _SPARE, num_rounds=_ROUNDS, check_finite=False)
    rest = scaled.matrix - (top.u * top.sigma.unsqueeze(-2)) @ top.v.mT
    # The values beyond K are orthogonal to the rest.
    tail = torch.linalg.vector_norm(top.sigma[..., k:], dim=-1)
    whole = frobenius_norm(scaled.matrix)
    share = (
        torch.hypot(frobenius_norm(rest), tail) / torch.where(whole > 0, whole, 1.0)
    ).clamp_max(1.0)
    return torch.where(scaled.finite, share, torch.nan)


@torch.no_grad()
def measure_low_rank_distances(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend, k: int
) -> dict[str, float]:
    """Return the relative distance to rank K of each 2-D matrix by name.

    Cost: full, for sampled steps. It costs twice as much as the stable rank. There is one batched
    call per shape, and one device-to-host read.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        k: K, the same for all matrices.
    """
    return measure_each(views, parameters, backend, lambda stack: low_rank_distance(stack, k))


class Neighbours(NamedTuple):
    """Names of a matrix that writes into the residual stream and of one that reads it next."""

    writer: str
    reader: str


def residual_neighbours(views: Sequence[MatrixView]) -> tuple[Neighbours, ...]:
    """Return the pairs of writer and next reader of the residual stream, in the model's order.

    [ours] A sublayer is a sequence of matrices of the same block and role. Its last matrix writes
    to the residual stream. All matrices before the last one read from it. For example, the up
    projections read after an attention output, and q, k and v read after a down projection. Pairs
    whose shapes do not fit are left out, and so are stacks of experts. If attention and MLP are
    parallel, they count in the order in which the model lists them. Two attentions of one block, as
    in a T5 decoder, count as one.

    >>> def view(name, role, m, n):
    ...     return MatrixView(name, name, role, "h.0", (m, n), False, None, "")
    >>> path = [view("q", "attention", 4, 4), view("o", "attention", 4, 4)]
    >>> path += [view("up", "mlp", 8, 4), view("down", "mlp", 4, 8)]
    >>> residual_neighbours(path)
    (Neighbours(writer='o', reader='up'),)
    """
    runs = [list(run) for _, run in itertools.groupby(views, key=lambda v: (v.block, v.role))]
    return tuple(
        Neighbours(before[-1].name, reader.name)
        for before, after in itertools.pairwise(runs)
        for reader in after[:-1]
        if len(before[-1].shape) == len(reader.shape) == 2
        and before[-1].shape[-2] == reader.shape[-1]
    )


@torch.no_grad()
def measure_alignments(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[Neighbours, float]:
    """Return |v₁(W_{l+1})ᵀ u₁(W_l)|, in [0, 1], of each pair of `residual_neighbours`.

    Definition 3.2 of arXiv 2602.01734 compares the Jacobians of neighbouring layers in this way.
    [ours] We compare the weights. This ignores norms, activations, the residual stream between the
    two matrices, and all directions except the first. For independent random directions of n
    dimensions its mean is √(2/πn). If σ₁ = σ₂, the first direction can be any direction in a plane,
    and the number has no meaning. It is 0 if one matrix is zero, and NaN if one holds NaN or inf.

    Cost: full, for sampled steps. The first triplet of each matrix in a pair comes from a complete
    decomposition up to a side of 128. There is one batched call per shape, and one device-to-host
    read. Every rank measures all pairs.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.

    Raises:
        ElsewhereError: A decomposition failed on another rank, which raises its own error.
    """
    pairs = residual_neighbours(views)
    if not pairs:
        return {}
    wanted = {name for pair in pairs for name in pair}
    first: dict[str, tuple[Tensor, Tensor]] = {}
    error: Exception | None = None
    for stack in stacks([view for view in views if view.name in wanted], parameters, backend):
        try:
            u, v = first_directions(stack.matrices)
        except Exception as caught:  # the other ranks wait for this one in the next gather
            error = caught
            continue
        first |= {name: (u[i].float(), v[i].float()) for i, name in enumerate(stack.names)}
    table = torch.zeros(len(pairs) + 1, device=next(iter(parameters.values())).device)
    if error is None:
        for i, (writer, reader) in enumerate(pairs):
            u, v = first[writer][0], first[reader][1]
            table[i] = (u * v.to(u.device)).sum().abs().clamp_max(1.0)
    table[-1] = float(error is not None)
    *cosines, has_failed = backend.agree(table)
    if has_failed:
        raise_together(error)
    return dict(zip(pairs, cosines, strict=True))


def first_directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return u₁ (..., m) and v₁ (..., n), zero for a zero matrix, NaN for a non-finite one."""
    triplets = leading_triplets(weight, 1, check_finite=False)
    sigma = triplets.sigma
    held = torch.where(sigma > 0, 1.0, sigma)  # torch.sign(NaN) would be 0
    return triplets.u[..., 0] * held, triplets.v[..., 0] * held
