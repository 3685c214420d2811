"""Weight matrices in stacks of equal shape, so that a batched call serves a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

from hf_pss.distributed import Backend
from hf_pss.selection import MatrixView

__all__ = [
    "Slot",
    "Stack",
    "Turn",
    "decomposition_cost",
    "gather",
    "matrix_names",
    "matrix_shapes",
    "matrix_slots",
    "measure_each",
    "read_turn",
    "share_out",
    "stacks",
    "write_stack_",
]

# fp32 elements in one batched call (64 MiB): bounds the extra memory of a whole-model reading. One
# matrix that is larger has a stack for itself.
_MAX_ELEMENTS = 2**24
# Columns of a decomposition's work: small matrices are decomposed whole, large ones iterated.
_MAX_COLUMNS = 144


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one 2-D matrix of a stack came from: a view, and which expert of it (None: all)."""

    name: str
    view: MatrixView
    expert: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.view.shape[-2], self.view.shape[-1]


Turn: TypeAlias = tuple[tuple[Slot, ...], ...]
"""What each rank works on at the same time as all others: one stack's slots a rank, or none."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one shape: ``matrices`` is (len(names), m, n), a copy in the stored dtype."""

    slots: tuple[Slot, ...]
    matrices: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices' names, in the order of the stack."""
        return tuple(slot.name for slot in self.slots)

    def where(self, kept: Sequence[bool]) -> Self:
        """Return the stack of those matrices for which ``kept`` is true."""
        index = [i for i, keep in enumerate(kept) if keep]
        return type(self)(self.where_slots(kept), self.matrices[index])

    def where_slots(self, kept: Sequence[bool]) -> tuple[Slot, ...]:
        """Return the slots for which ``kept`` is true."""
        return tuple(slot for slot, keep in zip(self.slots, kept, strict=True) if keep)


def _slots(view: MatrixView) -> list[Slot]:
    if len(view.shape) == 2:
        return [Slot(view.name, view, None)]
    return [Slot(f"{view.name}[{expert}]", view, expert) for expert in range(view.shape[0])]


def matrix_slots(views: Sequence[MatrixView]) -> tuple[Slot, ...]:
    """Return every 2-D matrix of the views."""
    return tuple(slot for view in views for slot in _slots(view))


def matrix_names(views: Sequence[MatrixView]) -> tuple[str, ...]:
    """Return a name for each 2-D matrix: the view's, with ``[e]`` for each expert of a stack."""
    return tuple(slot.name for view in views for slot in _slots(view))


def matrix_shapes(views: Sequence[MatrixView]) -> dict[str, tuple[int, int]]:
    """Return (m, n), outputs and inputs, for each 2-D matrix by name."""
    return {slot.name: slot.shape for view in views for slot in _slots(view)}


def decomposition_cost(shape: tuple[int, int]) -> int:
    """Return what decomposing an m × n matrix costs, in multiplications up to one factor."""
    m, n = shape
    return m * n * min(m, n, _MAX_COLUMNS)


def share_out(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    world_size: int,
    *,
    names: Collection[str] | None = None,
) -> tuple[Turn, ...]:
    """Share the selected matrices out over ranks, by cost, in stacks of equal shape.

    Every rank computes the same. All matrices of a parameter have one owner, so that it is gathered
    once; the dearest parameter goes to whoever has least to do so far. In each turn a rank has
    one stack.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        world_size: How many ranks share the work.
        names: Only these 2-D matrices; all when None.
    """
    wanted = [s for v in views for s in _slots(v) if names is None or s.name in names]
    by_parameter: dict[str, list[Slot]] = {}
    for slot in wanted:
        by_parameter.setdefault(slot.view.parameter_name, []).append(slot)
    costs = {
        name: sum(decomposition_cost(slot.shape) for slot in slots)
        for name, slots in by_parameter.items()
    }
    # Sorting is stable: among equals the model's order holds.
    load, owned = [0] * world_size, [[] for _ in range(world_size)]  # type: ignore[var-annotated]
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        owner = load.index(min(load))
        load[owner] += costs[name]
        owned[owner].append(name)
    position = {name: i for i, name in enumerate(by_parameter)}
    queues = []
    for mine in owned:
        slots = [s for name in sorted(mine, key=position.__getitem__) for s in by_parameter[name]]
        queues.append(list(_chunks(slots, parameters)))
    return tuple(itertools.zip_longest(*queues, fillvalue=()))


def _chunks(slots: Iterable[Slot], parameters: Mapping[str, Tensor]) -> Iterator[tuple[Slot, ...]]:
    """Group slots by shape, dtype and device, at most 64 MiB at a time."""
    groups: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        parameter = parameters[slot.view.parameter_name]
        groups.setdefault((slot.shape, parameter.dtype, parameter.device), []).append(slot)
    for group in groups.values():
        m, n = group[0].shape
        size = max(1, _MAX_ELEMENTS // (m * n))
        for first in range(0, len(group), size):
            yield tuple(group[first : first + size])


def read_turn(turn: Turn, parameters: Mapping[str, Tensor], backend: Backend) -> Stack | None:
    """Return this rank's stack of a turn, None where it has none; collective."""
    mine: list[Tensor] = []
    for owner, slots in enumerate(turn):
        for name, group in itertools.groupby(slots, key=lambda slot: slot.view.parameter_name):
            whole = backend.collect(parameters[name], owner)
            if whole is not None:
                mine += _matrices(group, whole)
    if not mine:
        return None
    # One large matrix is a stack for itself, and is not copied.
    return Stack(turn[backend.rank], mine[0][None] if len(mine) == 1 else torch.stack(mine))


def measure_each(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    backend: Backend,
    measure: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Return a number for each 2-D matrix by name, each measured by one rank and told to all.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        measure: Of a stack (b, m, n), shape (b,).
    """
    names: list[str] = []
    numbers: list[Tensor] = []
    for turn in share_out(views, parameters, backend.world_size):
        stack = read_turn(turn, parameters, backend)
        for owner, slots in enumerate(turn):
            names += [slot.name for slot in slots]
            if owner == backend.rank and stack is not None:
                numbers.append(measure(stack.matrices))
            elif slots:
                device = parameters[slots[0].view.parameter_name].device
                numbers.append(torch.zeros(len(slots), device=device))
    if not numbers:
        return {}
    device = numbers[0].device
    told = dict(zip(names, backend.tell(torch.cat([n.to(device) for n in numbers])), strict=True))
    return {name: told[name] for name in matrix_names(views)}


def stacks(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> Iterator[Stack]:
    """Yield all selected matrices on every rank, grouped by shape, at most 64 MiB at a time."""
    slots = [slot for view in views for slot in _slots(view)]
    for chunk in _chunks(slots, parameters):
        yield Stack(chunk, gather(chunk, parameters, backend))


def gather(slots: Sequence[Slot], parameters: Mapping[str, Tensor], backend: Backend) -> Tensor:
    """Return the matrices of these slots on every rank, (len(slots), m, n), a copy."""
    matrices: list[Tensor] = []
    for name, group in itertools.groupby(slots, key=lambda slot: slot.view.parameter_name):
        matrices += _matrices(group, backend.full(parameters[name]))
    return torch.stack(matrices)


def _matrices(slots: Iterable[Slot], parameter: Tensor) -> Iterator[Tensor]:
    for view, group in itertools.groupby(slots, key=lambda slot: slot.view):
        whole = view.read(parameter)
        yield from (whole if slot.expert is None else whole[slot.expert] for slot in group)


def write_stack_(
    stack: Stack,
    matrices: Tensor,
    changed: Sequence[bool],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> None:
    """Write the changed matrices of a stack into the model, each parameter once per view.

    Args:
        stack: Where the matrices came from.
        matrices: (len(stack.names), m, n), their new values.
        changed: Which of them to write; the others keep their bits.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    moved = [item for item in zip(stack.slots, matrices, changed, strict=True) if item[2]]
    for view, group in itertools.groupby(moved, key=lambda item: item[0].view):
        parameter = parameters[view.parameter_name]
        full = backend.full(parameter)
        items = [(slot.expert, matrix) for slot, matrix, _ in group]
        if items[0][0] is None:
            (_, whole) = items[0]
        else:
            whole = view.read(full).clone()
            for expert, matrix in items:
                whole[expert] = matrix
        view.write_(full, whole)
        backend.write_back_(parameter, full)
