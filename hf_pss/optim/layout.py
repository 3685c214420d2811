"""The layout of separate matrices within a parameter as plain values, and views made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hf_pss.models.selection import AdapterView, MatrixView

Part: TypeAlias = tuple[int, int, int] | tuple[int, int, int, int]
Layout: TypeAlias = tuple[bool, tuple[Part, ...]]
"""Whether inputs come first, and the output rows of each part: (start, size, period), as in
`RowPattern`. A part may have a fourth number, the rows of one head. Every head is then a separate
matrix. A parameter that is one matrix has no parts. The values are plain because an optimizer's
checkpoint is loaded without unpickling classes."""

_NUMBERS_BY_HEAD = 4

WHOLE: Layout = (False, ())


def layout_of(views: Sequence[MatrixView]) -> Layout:
    """Return the layout of these views, which all belong to one parameter.

    If the views leave out rows of the parameter, the parameter counts as one matrix.
    """
    transposed = views[0].transposed
    parts = tuple((v.rows.start, v.rows.size, v.rows.period) for v in views if v.rows is not None)
    is_split = len(parts) == len(views) and len({period for *_, period in parts}) == 1
    is_complete = is_split and sum(size for _, size, _ in parts) == parts[0][2]
    return transposed, parts if is_complete else ()


def by_head(layout: Layout, *, num_rows: int, head_rows: Sequence[int]) -> Layout:
    """Return the layout in which every head is a separate matrix.

    Neighbouring parts with heads of equal size become one part, so that the heads of
    [q|k|v] form one stack.

    Args:
        layout: A result of `layout_of`.
        num_rows: Output rows of the parameter.
        head_rows: The number of rows of a head in each part. It divides the number of rows that the
            part has in a period. A layout without parts counts as one part.

    Example:
        >>> fused = (True, ((0, 8, 24), (8, 8, 24), (16, 8, 24)))  # GPT-2, two heads of 4
        >>> by_head(fused, num_rows=24, head_rows=[4, 4, 4])
        (True, ((0, 24, 24, 4),))
    """
    transposed, given = layout
    parts = given or ((0, num_rows, num_rows),)
    joined: list[tuple[int, int, int, int]] = []
    for (start, size, period, *_), rows in zip(parts, head_rows, strict=True):
        if joined and joined[-1][3] == rows and sum(joined[-1][:2]) == start:
            first, before, *_ = joined.pop()
            start, size = first, before + size
        joined.append((start, size, period, rows))
    divided: list[Part] = []
    for start, size, period, rows in joined:
        if size in (rows, period) or period == num_rows:
            divided.append((start, size, period, rows))
        else:  # a single view needs heads at equal distances
            divided += [(at, rows, period, rows) for at in range(start, start + size, rows)]
    return transposed, tuple(divided)


def is_by_head(layout: Layout) -> bool:
    """Return whether `by_head` made a layout."""
    return any(len(part) == _NUMBERS_BY_HEAD for part in layout[1])


def layouts_of_factors(view: AdapterView, *, num_rows: int) -> dict[str, Layout]:
    """Return the layouts of an adapter's factors B and A, by parameter name.

    PEFT stores the E experts of A one below the other, and the experts of B column by column. The
    experts of B are read transposed, so update scales swap their inputs and outputs.

    Args:
        view: Any product of the two factors.
        num_rows: The number of rows of A's parameter, E·r.
    """
    count = view.num_experts
    if count == 1:
        return {view.left_name: WHOLE, view.right_name: WHOLE}
    rank = num_rows // count
    left = tuple((expert, 1, count) for expert in range(count))
    right = tuple((expert * rank, rank, num_rows) for expert in range(count))
    return {view.left_name: (True, left), view.right_name: (False, right)}


def runs_of(stored: Tensor, layout: Layout) -> list[Tensor]:
    """Return one view (matrices, runs, rows, inputs) for each part of a tensor.

    A matrix consists of runs, one below the other. It has one run for each head if its rows lie
    within heads, and otherwise a single run.

    Args:
        stored: The tensor, with the parameter's shape: (rows, columns), or
            (experts, rows, columns).
        layout: The parameter's layout.
    """
    transposed, parts = layout
    whole = stored if stored.ndim == 3 else stored[None]
    whole = whole.mT if transposed else whole
    if not parts:
        return [whole[:, None]]
    found = []
    for start, size, period, *head in parts:
        runs = torch.unflatten(whole, 1, (-1, period)).narrow(2, start, size)
        if head:
            # Only a single matrix has heads. A stack of experts has none. `view`
            # raises if it must copy.
            runs = runs.view(-1, 1, *head, runs.shape[-1])
        found.append(runs)
    return found


def matrices_of(stored: Tensor, layout: Layout) -> list[Tensor]:
    """Return (matrices, outputs, inputs) for each part of a tensor.

    The result is a view, unless the rows of a projection come in runs within heads.

    Args:
        stored: As in `runs_of`.
        layout: The parameter's layout.
    """
    return [runs.flatten(1, 2) for runs in runs_of(stored, layout)]
