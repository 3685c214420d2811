"""LoRA adapters: the spectrum of each product s·B·A, measured and smoothed through its factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn import functional

from hf_pss.linalg import (
    SmoothingFunction,
    SmoothingStatus,
    product_triplets,
    quick_stable_rank,
    smooth_product,
)
from hf_pss.models.anchors import NUM_RECORDED
from hf_pss.models.batching import measure_each, raise_together
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import AdapterView, MatrixView
from hf_pss.models.smoother import FAILED, NON_FINITE, RAISED, PhiFor, matrix_change
from hf_pss.records.events import MatrixChange

_COLLAPSED = 2.0
# The number of elements of factors in one batched call.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class AdapterSpectrum:
    """The numbers of one product s·B·A. 0 if B or s is zero, NaN if a factor is not finite."""

    sigma: float
    """The exact σ₁."""
    frobenius: float
    stable_rank: float
    leading: tuple[float, ...] = ()
    """The leading singular values. There are as many as `Anchors` records."""


@torch.no_grad()
def measure_adapter_spectra(
    views: Sequence[AdapterView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, AdapterSpectrum]:
    """Return σ₁, ‖s·B·A‖_F and the stable rank of each product by name.

    Every rank measures all products, because the factors are small. There is
    one device-to-host read.

    Args:
        views: The products to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    alike: dict[tuple[object, ...], list[_Factors]] = {}
    for factors in _factors(views, parameters, backend.full):
        left, right = factors.left, factors.right
        key = (left.shape[1:], right.shape[1:], left.dtype, left.device)
        alike.setdefault(key, []).append(factors)
    names: list[str] = []
    numbers: list[Tensor] = []
    for group in alike.values():
        left = torch.cat([factors.left for factors in group])
        right = torch.cat([factors.right for factors in group])
        size = max(1, _MAX_ELEMENTS // (left[0].numel() + right[0].numel()))
        pairs = zip(torch.split(left, size), torch.split(right, size), strict=True)
        sigma = torch.cat([product_triplets(b, a).sigma for b, a in pairs])
        # s does not change the stable rank, unless it is zero.
        own = [view for factors in group for view in factors.views]
        on = torch.tensor([view.scaling != 0 for view in own], device=left.device)
        names += [view.name for view in own]
        scaling = sigma.new_tensor([abs(view.scaling) for view in own])
        norm = torch.linalg.vector_norm(sigma, dim=-1) * scaling
        values = (sigma * scaling.unsqueeze(-1))[:, :NUM_RECORDED]
        values = functional.pad(values, (0, NUM_RECORDED - values.shape[-1]))
        scalars = torch.stack([sigma[:, 0] * scaling, norm, _stable_rank(sigma) * on], -1)
        numbers.append(torch.cat([scalars, values], dim=-1))
    if not numbers:
        return {}
    flat = iter(backend.agree(torch.cat([n.to(numbers[0].device) for n in numbers]).flatten()))
    rows = zip(*[flat] * (3 + NUM_RECORDED), strict=True)
    by_name = {
        name: AdapterSpectrum(sigma, frobenius, rank, leading=tuple(leading))
        for name, (sigma, frobenius, rank, *leading) in zip(names, rows, strict=True)
    }
    return {view.name: by_name[view.name] for view in views}


@torch.no_grad()
def smooth_adapters_(
    views: Sequence[AdapterView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    phi_for: PhiFor,
    *,
    names: Collection[str] | None = None,
    max_rank: int,
    keep_frobenius: bool = False,
    before_write: Callable[[Collection[str]], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Smooth the dominant singular values of products in place, by an edit of both factors.

    The first rank computes the result and sends it to the others, so that replicas stay equal bit
    for bit. This is cheap, because the factors are small. The factors are read and written in the
    optimizer's precision, which is fp32 under ZeRO.

    Args:
        views: The selected products.
        parameters: The model's parameters by canonical name. Factors change in place.
        backend: How parameters are stored.
        phi_for: As in `hf_pss.models.smoother.smooth_matrices_`.
        names: The products to smooth. None means all.
        max_rank: The largest number of singular values of a product that may move.
        keep_frobenius: Rescale each smoothed product to its previous Frobenius norm.
        before_write: As in `hf_pss.models.smoother.smooth_matrices_`.

    Raises:
        ElsewhereError: The first rank failed, and raises its own error.
    """
    changes: list[MatrixChange] = []
    wanted = [view for view in views if names is None or view.name in names]
    for factors in _factors(wanted, parameters, backend.master):
        # The result of rank 0: a status, k, and σ₁ and the stable rank before and after.
        numbers = factors.left.new_zeros(len(factors.views), 6, dtype=torch.float64)
        error: Exception | None = None
        if backend.rank == 0:
            options = {"max_rank": max_rank, "keep_frobenius": keep_frobenius}
            try:
                phi = phi_for([view.name for view in factors.views])
                factors, found = _smoothed(factors, phi, **options)
                numbers.copy_(found)
            except Exception as caught:
                error = caught
                numbers[:, 0] = RAISED
        backend.send_(numbers, 0)
        rows = numbers.tolist()
        if rows[0][0] == RAISED:
            raise_together(error)
        if any(row[0] == SmoothingStatus.SMOOTHED for row in rows):
            if before_write is not None:
                before_write((factors.views[0].left_name, factors.views[0].right_name))
            _write_(factors, parameters, backend)
        changes += [
            matrix_change(view.name, view.shape, *row)
            for view, row in zip(factors.views, rows, strict=True)
        ]
    return tuple(changes)


def _smoothed(factors: _Factors, phi: SmoothingFunction, **options: Any) -> tuple[_Factors, Tensor]:
    """Return the factors after smoothing, and the numbers to send for each product, (b, 6)."""
    left, right = factors.left, factors.right
    try:
        found = smooth_product(left, right, phi, scaling=factors.views[0].scaling, **options)
    except LinAlgError:
        numbers = left.new_zeros(len(left), 6, dtype=torch.float64)
        numbers[:, 0] = FAILED
        return factors, numbers
    finite = left.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
    before, after = found.sigma_before, found.sigma_after
    columns = (
        torch.where(finite, found.status, NON_FINITE),
        found.rank,
        before[:, 0],
        after.amax(dim=-1),
        _stable_rank(before),
        _stable_rank(after),
    )
    smoothed = replace(factors, left=found.left, right=found.right)
    return smoothed, torch.stack([column.double() for column in columns], dim=-1)


@torch.no_grad()
def frozen_collapses(
    views: Sequence[AdapterView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable ranks below 2 of the frozen weights that the adapters are added to.

    An edit of s·B·A cannot remove a direction of W₀ outside the span of B, so the caller warns.
    Quantised bases, whether integer or packed, are skipped.
    """
    bases: dict[str, MatrixView] = {}
    for view in views:
        base = parameters.get(view.base_name) if view.base_name is not None else None
        if base is None or not base.is_floating_point() or view.base_name is None:
            continue
        shape = tuple(getattr(base, "ds_shape", base.shape))
        # A transposed base has the same stable rank. A packed base has a different shape.
        if shape[-2:] in (view.shape, view.shape[::-1]) and len(shape) in (2, 3):
            name = view.base_name
            bases[name] = MatrixView(name, name, "mlp", "", shape, False, None, "frozen base")
    ranks = measure_each(list(bases.values()), parameters, backend, quick_stable_rank)
    return {name: rank for name, rank in ranks.items() if 0 < rank < _COLLAPSED}


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of products that share parameters: one product, or the experts of an adapter."""

    views: tuple[AdapterView, ...]
    left: Tensor
    """A copy of B, (len(views), m, r)."""
    right: Tensor
    """A copy of A, (len(views), r, n)."""


def _factors(
    views: Sequence[AdapterView],
    parameters: Mapping[str, nn.Parameter],
    read: Callable[[Tensor], Tensor],
) -> Iterator[_Factors]:
    """Yield the complete factors of all products on every rank."""
    for _, group in itertools.groupby(views, key=lambda view: (view.left_name, view.right_name)):
        own = tuple(group)
        experts = [view.expert for view in own]
        left = _left(own[0], read(parameters[own[0].left_name]))
        right = _right(own[0], read(parameters[own[0].right_name]))
        yield _Factors(own, left[experts], right[experts])


def _left(view: AdapterView, whole: Tensor) -> Tensor:
    # PEFT stores the experts of B along the last dimension, and those of A along the first one.
    return torch.unflatten(whole, 1, (-1, view.num_experts)).permute(2, 0, 1)


def _right(view: AdapterView, whole: Tensor) -> Tensor:
    return torch.unflatten(whole, 0, (view.num_experts, -1))


def _write_(factors: _Factors, parameters: Mapping[str, nn.Parameter], backend: Backend) -> None:
    view, experts = factors.views[0], [view.expert for view in factors.views]
    for name, new, place in (
        (view.left_name, factors.left, _left),
        (view.right_name, factors.right, _right),
    ):
        new = new.contiguous()
        backend.send_(new, 0)
        whole = backend.master(parameters[name]).clone()
        place(view, whole)[experts] = new
        backend.write_back_(parameters[name], whole)


def _stable_rank(sigma: Tensor) -> Tensor:
    top = sigma.amax(dim=-1, keepdim=True)
    return (sigma / torch.where(top == 0, 1.0, top)).square().sum(dim=-1)
