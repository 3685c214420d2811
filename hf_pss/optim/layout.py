"""Separate matrices within parameters: their layout, and the directions of all of them.

A layout consists of plain values. Directions are computed in stacks of equal shape and bounded
size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hf_pss.models.distributed import ComputedTensor
from hf_pss.models.selection import AdapterView, MatrixView
from hf_pss.optim.rules import Options, Rule, State

Part: TypeAlias = tuple[int, int, int] | tuple[int, int, int, int]
Layout: TypeAlias = tuple[bool, tuple[Part, ...]]
"""Whether inputs come first, and the output rows of each part: (start, size, period), as in
`RowPattern`. A part may have a fourth number, the rows of one head. Every head is then a separate
matrix. A parameter that is one matrix has no parts. The values are plain because an optimizer's
checkpoint is loaded without unpickling classes."""

_NUMBERS_BY_HEAD = 4

WHOLE: Layout = (False, ())

# The largest number of elements in a stack. On a GPU it is large enough to keep the device busy. On
# a CPU batching does not speed up large matrices, so there a stack must fit into the cache.
_MAX_ELEMENTS = 2**26
_MAX_ELEMENTS_CPU = 2**20


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


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some matrices of one part of a parameter."""

    key: int
    part: int
    momenta: Tensor
    target: Tensor
    """Shape (matrices, runs, rows, inputs). The momenta have runs and rows in one dimension."""
    state: State

    def __len__(self) -> int:
        return len(self.momenta)


def directions_of(
    momenta: Mapping[int, Tensor],
    layouts: Sequence[Layout],
    states: Sequence[State],
    rule: Rule,
    options: Options,
) -> dict[int, ComputedTensor]:
    """Return the direction that a rule gives for each momentum, under the momentum's key.

    Args:
        momenta: Complete momenta of any shapes, laid out like their parameters, all on one device.
        layouts: The layout of each parameter, by key.
        states: The rule's state for each part of each parameter, by key: ``name.0``, ``name.1``, …
        rule: The rule.
        options: The options of the parameter group.
    """
    directions = {key: torch.empty_like(momentum) for key, momentum in momenta.items()}
    pieces: dict[int, dict[str, list[Tensor]]] = {key: {} for key in momenta}
    slices = (
        piece
        for key, momentum in momenta.items()
        for piece in _slices(key, momentum, directions[key], layouts[key], states[key])
    )
    for stack in _stacks(slices):
        joined = _joined([piece.momenta for piece in stack]).float()
        state = {name: _joined([s.state[name] for s in stack]) for name in stack[0].state}
        found, state = rule.direction(joined, state, options)
        sizes = [len(piece) for piece in stack]
        for piece, direction in zip(stack, found.split_with_sizes(sizes), strict=True):
            piece.target.copy_(direction.reshape(piece.target.shape))
        for name, values in state.items():
            for piece, value in zip(stack, values.split_with_sizes(sizes), strict=True):
                pieces[piece.key].setdefault(f"{name}.{piece.part}", []).append(value)
    return {
        # The states are copies, because a view would keep and save the memory of the whole stack.
        key: ComputedTensor(direction, {n: torch.cat(own) for n, own in pieces[key].items()})
        for key, direction in directions.items()
    }


def _slices(
    key: int, momentum: Tensor, direction: Tensor, layout: Layout, state: State
) -> Iterator[_Slice]:
    parts = zip(runs_of(momentum, layout), runs_of(direction, layout), strict=True)
    for part, (runs, target) in enumerate(parts):
        matrices = runs.flatten(1, 2)  # a copy only if the rows lie within heads
        ending = f".{part}"
        size = max(1, _limit(matrices) // matrices[0].numel())
        for first in range(0, len(matrices), size):
            here = slice(first, first + size)
            own = {
                name.removesuffix(ending): value[here]
                for name, value in state.items()
                if name.endswith(ending)
            }
            yield _Slice(key, part, matrices[here], target[here], own)


def _stacks(slices: Iterable[_Slice]) -> Iterator[list[_Slice]]:
    by_shape: dict[object, list[_Slice]] = {}
    for piece in slices:
        stack = by_shape.setdefault((piece.momenta.shape[1:], frozenset(piece.state)), [])
        num_matrices = len(piece) + sum(len(other) for other in stack)
        if stack and num_matrices * piece.momenta[0].numel() > _limit(piece.momenta):
            yield stack.copy()
            stack.clear()
        stack.append(piece)
    yield from (stack for stack in by_shape.values() if stack)


def _limit(tensor: Tensor) -> int:
    return _MAX_ELEMENTS_CPU if tensor.is_cpu else _MAX_ELEMENTS


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
