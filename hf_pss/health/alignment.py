"""Alignment of neighbours: whether a matrix amplifies the direction that the last one writes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_pss.errors import SelectionError
from hf_pss.linalg import leading_triplets
from hf_pss.models.batching import matrix_names, raise_together, stacks
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = [
    "Neighbours",
    "measure_alignments",
    "neighbour_alignment",
    "residual_neighbours",
]


class Neighbours(NamedTuple):
    """Names of a matrix that writes into the residual stream and of one that reads it next."""

    writer: str
    reader: str


def neighbour_alignment(writer: Tensor, reader: Tensor) -> Tensor:
    """Return |v₁(W_{l+1})ᵀ u₁(W_l)|, in [0, 1].

    This is the cheap proxy of arXiv 2602.01734 for the alignment of neighbouring layers' Jacobians.
    It ignores norms, activations, the residual stream between the two matrices, and all directions
    except the first. For independent random directions of n dimensions its mean is √(2/πn). If
    σ₁ = σ₂, the first direction can be any direction in a plane, and the number has no meaning.

    Args:
        writer: (..., m, n), W_l, any real floating dtype.
        reader: (..., k, m), W_{l+1}.

    Returns:
        The alignment, (...), float32, or float64 if both inputs are float64. It is 0 if one matrix
        is zero, and NaN if one holds NaN or inf.

    >>> a = torch.outer(torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0, 0.0]))
    >>> round(neighbour_alignment(a, torch.tensor([[1.0, 0.0]])).item(), 6)
    0.6
    """
    u, v = _first(writer)[0], _first(reader)[1]
    dtype = torch.promote_types(u.dtype, v.dtype) if u.dtype == v.dtype else torch.float32
    return _cosine(u.to(dtype), v.to(dtype))


def residual_neighbours(views: Sequence[MatrixView]) -> tuple[Neighbours, ...]:
    """Return the pairs of writer and next reader of the residual stream, in the model's order.

    [ours] A sublayer is a run of matrices with one block and one role. The last matrix of a run
    writes, and all matrices of the next run except its last one read. For example, the up
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
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    neighbours: Sequence[Neighbours] | None = None,
) -> dict[Neighbours, float]:
    """Return the alignment of each pair of neighbours.

    Cost: full, for sampled steps. The first triplet of each matrix in a pair comes from a complete
    decomposition up to a side of 128. There is one batched call per shape, and one device-to-host
    read. Every rank measures all pairs.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        neighbours: The pairs. None means the result of `residual_neighbours`.

    Raises:
        SelectionError: A pair names a matrix that no view holds.
        ElsewhereError: A decomposition failed on another rank, which raises its own error.
    """
    pairs = residual_neighbours(views) if neighbours is None else tuple(neighbours)
    wanted = {name for pair in pairs for name in pair}
    if missing := sorted(wanted.difference(matrix_names(views))):
        raise SelectionError(
            f"You gave neighbours with {missing[0]!r}, but none of the {len(views)} views has "
            "that name; give names of 2-D matrices as a MatrixView has them."
        )
    first: dict[str, tuple[Tensor, Tensor]] = {}
    held = [view for view in views if wanted.intersection(matrix_names([view]))]
    error: Exception | None = None
    for stack in stacks(held, parameters, backend):
        try:
            u, v = _first(stack.matrices)
        except Exception as caught:  # the other ranks wait for this one in the next gather
            error = caught
            continue
        first |= {name: (u[i], v[i]) for i, name in enumerate(stack.names)}
    if not pairs:
        return {}
    device = next(iter(parameters.values())).device
    table = torch.zeros(len(pairs) + 1, device=device)
    table[-1] = float(error is not None)
    if error is None:
        for i, pair in enumerate(pairs):
            table[i] = _cosine(first[pair.writer][0].float(), first[pair.reader][1].float())
    *cosines, has_failed = backend.agree(table)
    if has_failed:
        raise_together(error)
    return dict(zip(pairs, cosines, strict=True))


def _first(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return u₁ (..., m) and v₁ (..., n), zero for a zero matrix, NaN for a non-finite one."""
    triplets = leading_triplets(weight, 1, check_finite=False)
    sigma = triplets.sigma
    held = torch.where(sigma > 0, 1.0, sigma)  # torch.sign(NaN) would be 0
    return triplets.u[..., 0] * held, triplets.v[..., 0] * held


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v.to(u.device)).sum(dim=-1).abs().clamp_max(1.0)
