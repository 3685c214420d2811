"""How a parameter holds the matrices that are moved one by one: plain values, and views by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from hf_pss.selection import MatrixView
from hf_pss.selection.adapters import AdapterView

__all__ = ["WHOLE", "Layout", "layout_of", "layouts_of_factors", "matrices_of"]

Layout: TypeAlias = tuple[bool, tuple[tuple[int, int, int], ...]]
"""Whether inputs come first, and (start, size, period) of each matrix's output rows, as
`RowPattern` has them; no such triple for a parameter that is one matrix. Plain values, since an
optimizer's checkpoint is loaded without unpickling classes."""

WHOLE: Layout = (False, ())


def layout_of(views: Sequence[MatrixView]) -> Layout:
    """Return how these views, all of one parameter, lie in it.

    A projection whose rows come in runs of several a period (heads of [q|k|v]) is no view of two
    dimensions. Such a parameter, and one whose views leave rows out, counts as one matrix.
    """
    transposed = views[0].transposed
    parts = tuple((v.rows.start, v.rows.size, v.rows.period) for v in views if v.rows is not None)
    num_rows = sum(view.shape[-2] for view in views)
    is_split = len(parts) == len(views) and len({period for *_, period in parts}) == 1
    is_complete = is_split and sum(size for _, size, _ in parts) == parts[0][2]
    is_flat = all(size == 1 or period == num_rows for _, size, period in parts)
    return transposed, parts if is_complete and is_flat else ()


def layouts_of_factors(view: AdapterView, *, num_rows: int) -> dict[str, Layout]:
    """Return how the factors B and A of an adapter lie in their parameters, by parameter name.

    Of E experts, PEFT keeps those of A one below the other, and those of B column by column: each
    of these is seen transposed, so that a scale takes its inputs for its outputs.

    Args:
        view: Any product of the two.
        num_rows: Of A's parameter, E·r.
    """
    count = view.num_experts
    if count == 1:
        return {view.left_name: WHOLE, view.right_name: WHOLE}
    rank = num_rows // count
    left = tuple((expert, 1, count) for expert in range(count))
    right = tuple((expert * rank, rank, num_rows) for expert in range(count))
    return {view.left_name: (True, left), view.right_name: (False, right)}


def matrices_of(stored: Tensor, layout: Layout) -> list[Tensor]:
    """Return views (matrices, outputs, inputs), one for each part, of what is laid out like this.

    Args:
        stored: (rows, columns), or (experts, rows, columns), of the parameter's shape.
        layout: Of the parameter.
    """
    transposed, parts = layout
    whole = stored if stored.ndim == 3 else stored[None]
    whole = whole.mT if transposed else whole
    if not parts:
        return [whole]
    return [
        whole[:, start::period] if size == 1 else whole.narrow(1, start, size)
        for start, size, period in parts
    ]
