"""Weight matrices in stacks of equal shape, so that a batched call serves a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn, Self, TypeAlias

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.errors import ElsewhereError
from hf_pss.models.distributed import Backend, owners_of
from hf_pss.models.selection import MatrixView

__all__ = [
    "DecompositionError",
    "Slot",
    "Stack",
    "Tally",
    "Turn",
    "decomposition_cost",
    "expert_rows",
    "gather",
    "matrix_names",
    "matrix_shapes",
    "matrix_slots",
    "measure_each",
    "measure_rows",
    "raise_together",
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

    @property
    def matrix_view(self) -> MatrixView:
        """The view of this matrix alone, inside its expert's part of the parameter."""
        return replace(self.view, shape=self.shape)


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
        return type(self)(tuple(self.slots[i] for i in index), self.matrices[index])


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

    Every rank computes the same. All matrices of a parameter have one owner, so that it is
    gathered once; the dearest parameter goes to whoever has least to do so far. In each turn a
    rank has one stack. Experts come in order, with all matrices of one beside each other: a turn
    needs few rows of their parameter.

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
    tasks = [sorted(slots, key=lambda slot: slot.expert or 0) for slots in by_parameter.values()]
    costs = [sum(decomposition_cost(slot.shape) for slot in slots) for slots in tasks]
    owners = owners_of(costs, world_size)
    queues = []
    for rank in range(world_size):
        mine = (slots for slots, owner in zip(tasks, owners, strict=True) if owner == rank)
        queues.append(list(_chunks(itertools.chain.from_iterable(mine), parameters)))
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


def expert_rows(slots: Iterable[Slot]) -> slice | None:
    """Return the rows of the stored parameter that hold these experts; None where it has none."""
    experts = [slot.expert for slot in slots]
    found = [expert for expert in experts if expert is not None]
    return slice(min(found), max(found) + 1) if len(found) == len(experts) else None


def read_turn(turn: Turn, parameters: Mapping[str, Tensor], backend: Backend) -> Stack | None:
    """Return this rank's stack of a turn, None where it has none; collective."""
    mine: list[Tensor] = []
    for owner, slots in enumerate(turn):
        for name, group in itertools.groupby(slots, key=lambda slot: slot.view.parameter_name):
            own = tuple(group)
            rows = expert_rows(own)
            stored = backend.collect(parameters[name], owner, rows)
            if stored is not None:
                mine += _matrices(own, stored, 0 if rows is None else rows.start)
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

    def column(matrices: Tensor) -> Tensor:
        return measure(matrices).unsqueeze(-1)

    rows = measure_rows(views, parameters, backend, column, width=1)
    return {name: number for name, (number,) in rows.items()}


def measure_rows(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    backend: Backend,
    measure: Callable[[Tensor], Tensor],
    *,
    width: int,
) -> dict[str, tuple[float, ...]]:
    """Return several numbers for each 2-D matrix by name; otherwise as `measure_each`.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        measure: Of a stack (b, m, n), shape (b, width).
        width: How many numbers for each matrix.
    """
    tally = Tally(parameters, backend, width)
    for turn in share_out(views, parameters, backend.world_size):
        stack, found = read_turn(turn, parameters, backend), None
        if stack is not None:
            with tally.guard():
                found = measure(stack.matrices)
        tally.add(turn, found)
    told = tally.told()
    return {name: told[name] for name in matrix_names(views)}


class DecompositionError(LinAlgError):  # type: ignore[misc]
    """A decomposition has failed on some rank, and every rank raises this: they can go on."""


class Tally:
    """Numbers by matrix, each found by one rank; and the error that a rank has met meanwhile.

    A rank on its own way out would leave the others waiting for it: it goes on with them to the
    end, where all raise.
    """

    def __init__(self, parameters: Mapping[str, Tensor], backend: Backend, width: int) -> None:
        self._device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self._backend = backend
        self._width = width
        self._names: list[str] = []
        self._numbers: list[Tensor] = []
        self._error: Exception | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep an error until all have been told."""
        try:
            yield
        except Exception as error:
            if self._error is None or isinstance(self._error, LinAlgError):
                self._error = error

    def add(self, turn: Turn, mine: Tensor | None) -> None:
        """Take this rank's numbers of a turn, (slots, width); None where it has none."""
        for owner, slots in enumerate(turn):
            self._names += [slot.name for slot in slots]
            zeros = torch.zeros(len(slots) * self._width)
            is_mine = owner == self._backend.rank and mine is not None
            self._numbers.append(mine.flatten() if is_mine and mine is not None else zeros)

    def told(self) -> dict[str, tuple[float, ...]]:
        """Return all numbers by name, on every rank; one device-to-host read.

        Raises:
            DecompositionError: Decompositions have failed on some ranks, and nothing worse.
            ElsewhereError: An error was kept on another rank. Where it was, it is raised itself.
        """
        if not self._names:
            return {}
        has_failed = isinstance(self._error, LinAlgError)
        has_error = self._error is not None and not has_failed
        flags = torch.tensor([float(has_failed), float(has_error)])
        every = [number.to(self._device) for number in (*self._numbers, flags)]
        *numbers, num_failed, num_errors = self._backend.tell(torch.cat(every))
        if num_errors:
            raise_together(self._error)
        if num_failed:
            why = self._error or "a decomposition has failed on another rank"
            raise DecompositionError(str(why)) from self._error
        rows = zip(*[iter(numbers)] * self._width, strict=True)
        return dict(zip(self._names, rows, strict=True))


def raise_together(error: Exception | None) -> NoReturn:
    """Raise this rank's own error, or, where it has none, that of a rank that others met.

    Raises:
        ElsewhereError: See there.
    """
    if error is not None:
        raise error
    raise ElsewhereError(
        "Another rank has failed while it looked at its matrices, and this run ends with it; its "
        "own message, in the log of that rank, says why."
    )


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


def _matrices(slots: Iterable[Slot], stored: Tensor, start: int = 0) -> Iterator[Tensor]:
    """Yield the matrices of slots, given the rows of their parameter from ``start`` on."""
    for slot in slots:
        part = stored if slot.expert is None else stored[slot.expert - start]
        yield slot.matrix_view.read(part)


def write_stack_(
    stack: Stack,
    matrices: Tensor,
    changed: Sequence[bool],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> None:
    """Write the changed matrices of a stack into the model, each parameter once.

    Args:
        stack: Where the matrices came from.
        matrices: (len(stack.names), m, n), their new values.
        changed: Which of them to write; the others keep their bits.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    moved = [item for item in zip(stack.slots, matrices, changed, strict=True) if item[2]]
    for name, group in itertools.groupby(moved, key=lambda item: item[0].view.parameter_name):
        full = backend.full(parameters[name])
        for slot, matrix, _ in group:
            slot.matrix_view.write_(full if slot.expert is None else full[slot.expert], matrix)
        backend.write_back_(parameters[name], full)
