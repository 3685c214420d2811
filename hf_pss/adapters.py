"""LoRA adapters: the spectrum of each product s·B·A, read off its factors and smoothed in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend
from hf_pss.events import MatrixChange
from hf_pss.linalg import (
    SmoothingFunction,
    SmoothingStatus,
    product_triplets,
    quick_stable_rank,
    smooth_product,
)
from hf_pss.selection import AdapterView, MatrixView
from hf_pss.stacks import measure_each

__all__ = ["frozen_collapses", "measure_adapters", "smooth_adapters_"]

_COLLAPSED = 2.0


@torch.no_grad()
def measure_adapters(
    views: Sequence[AdapterView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable rank of each product by name: 0 where B is zero, NaN where it is broken.

    Every rank measures all of them: the factors are small.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    if not views:
        return {}
    ranks = []
    for view, left, right in _factors(views, parameters, backend):
        sigma = product_triplets(left, right, view.scaling).sigma
        top = torch.where(sigma[:1] == 0, 1.0, sigma[:1])
        ranks.append((sigma / top).square().sum().reshape(1))
    device = ranks[0].device
    numbers = backend.agree(torch.cat([rank.to(device) for rank in ranks]))
    return {view.name: rank for view, rank in zip(views, numbers, strict=True)}


@torch.no_grad()
def smooth_adapters_(
    views: Sequence[AdapterView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    phi: SmoothingFunction,
    *,
    names: Collection[str] | None = None,
    max_rank: int,
    keep_frobenius: bool = False,
) -> tuple[MatrixChange, ...]:
    """Smooth the dominant singular values of products, in place, by an edit of both factors.

    Args:
        views: The selected products.
        parameters: The model's parameters by canonical name; factors change in place.
        backend: How parameters are stored.
        phi: The smoothing function.
        names: Only these products; all when None.
        max_rank: At most so many singular values of a product move.
        keep_frobenius: Rescale each smoothed product to the Frobenius norm it had.
    """
    changes = []
    wanted = [view for view in views if names is None or view.name in names]
    for view, left, right in _factors(wanted, parameters, backend):
        if not (left.isfinite().all() and right.isfinite().all()):
            changes.append(MatrixChange(view.name, view.shape, "non_finite"))
            continue
        smoothed = smooth_product(
            left,
            right,
            phi,
            scaling=view.scaling,
            max_rank=max_rank,
            keep_frobenius=keep_frobenius,
        )
        if bool(smoothed.changed):
            _write_(view, smoothed.left, smoothed.right, parameters, backend)
        before, after = smoothed.sigma_before, smoothed.sigma_after
        changes.append(
            MatrixChange(
                view.name,
                view.shape,
                SmoothingStatus(int(smoothed.status)).name.lower(),
                int(smoothed.rank),
                float(before[0]),
                float(after.max()),
                _stable_rank(before),
                _stable_rank(after),
            )
        )
    return tuple(changes)


@torch.no_grad()
def frozen_collapses(
    views: Sequence[AdapterView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable ranks below 2 of the frozen weights that the adapters are added to.

    A direction of W₀ outside the span of B cannot be removed by s·B·A: whoever has such a base is
    told, and nothing is attempted. Quantised bases are passed over.
    """
    bases: dict[str, MatrixView] = {}
    for view in views:
        base = parameters.get(view.base_name) if view.base_name is not None else None
        if base is None or not base.is_floating_point() or view.base_name is None:
            continue
        shape = tuple(getattr(base, "ds_shape", base.shape))
        if len(shape) == 2:  # either way round: the rank is the same
            name = view.base_name
            bases[name] = MatrixView(name, name, "mlp", "", shape, False, None, "frozen base")
    ranks = measure_each(list(bases.values()), parameters, backend, quick_stable_rank)
    return {name: rank for name, rank in ranks.items() if 0 < rank < _COLLAPSED}


def _factors(
    views: Sequence[AdapterView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> Iterator[tuple[AdapterView, Tensor, Tensor]]:
    """Yield B, (m, r), and A, (r, n), of each product, whole, on every rank."""
    for view in views:
        left = backend.full(parameters[view.left_name])
        right = backend.full(parameters[view.right_name])
        yield view, _left(view, left), _right(view, right)


def _left(view: AdapterView, whole: Tensor) -> Tensor:
    # PEFT keeps the experts of B innermost, and those of A outermost.
    return torch.unflatten(whole, 1, (-1, view.num_experts))[..., view.expert]


def _right(view: AdapterView, whole: Tensor) -> Tensor:
    return torch.unflatten(whole, 0, (view.num_experts, -1))[view.expert]


def _write_(
    view: AdapterView,
    left: Tensor,
    right: Tensor,
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
) -> None:
    for name, factor, place in ((view.left_name, left, _left), (view.right_name, right, _right)):
        factor = factor.contiguous()
        backend.send_(factor, 0)  # replicas stay equal bit for bit
        whole = backend.full(parameters[name]).clone()
        place(view, whole).copy_(factor)
        backend.write_back_(parameters[name], whole)


def _stable_rank(sigma: Tensor) -> float:
    top = float(sigma.max())
    return float((sigma / top).square().sum()) if top > 0 else 0.0
