"""Weight matrices in stacks of equal shape, so that one batched call handles many of them.

If there are several ranks, they share the work. Each rank reads and decomposes some of the stacks,
and sends small results to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.errors import ElsewhereError
from hf_pss.models.distributed import Backend, owners_of
from hf_pss.models.selection import MatrixView

# The number of fp32 elements in one batched call (64 MiB). It bounds the extra memory of reading a
# whole model. A larger matrix gets a separate stack.
_MAX_ELEMENTS = 2**24
# The number of columns that a decomposition works on. Small matrices are decomposed completely, and
# large ones are iterated.
_MAX_COLUMNS = 144


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """The origin of one 2-D matrix of a stack: a view, and the expert in it (None: all of it)."""

    name: str
    view: MatrixView
    expert: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.view.shape[-2], self.view.shape[-1]

    def read(self, stored: Tensor, start: int = 0) -> Tensor:
        """Return the matrix, given the rows of its parameter from ``start`` on."""
        return self.matrix_view.read(stored if self.expert is None else stored[self.expert - start])

    def read_stored(self, stored: Tensor) -> Tensor:
        """Return the matrix as it is stored, given its complete parameter: inputs may be first."""
        found = self.read(stored)
        return found.mT if self.view.transposed else found

    def write_(self, full: Tensor, matrix: Tensor) -> None:
        """Write the matrix into its complete parameter."""
        self.matrix_view.write_(full if self.expert is None else full[self.expert], matrix)

    @property
    def matrix_view(self) -> MatrixView:
        """The view of only this matrix, inside its expert's part of the parameter."""
        return self.view if self.expert is None else replace(self.view, shape=self.shape)


Round: TypeAlias = tuple[tuple[MatrixRef, ...], ...]
"""The matrices that all ranks work on at the same time. Each rank has one stack, or none."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one shape. ``matrices`` is (len(names), m, n), a copy in the stored dtype."""

    refs: tuple[MatrixRef, ...]
    matrices: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the matrices, in the order of the stack."""
        return tuple(ref.name for ref in self.refs)


def matrix_refs(views: Iterable[MatrixView]) -> tuple[MatrixRef, ...]:
    """Return every 2-D matrix of the views. Its name is the view's, plus ``[e]`` for expert e."""
    return tuple(
        MatrixRef(view.name if expert is None else f"{view.name}[{expert}]", view, expert)
        for view in views
        for expert in ([None] if len(view.shape) == 2 else range(view.shape[0]))
    )


def matrix_names(views: Iterable[MatrixView]) -> tuple[str, ...]:
    """Return a name for each 2-D matrix, as in `matrix_refs`."""
    return tuple(matrix_shapes(views))


def matrix_shapes(views: Iterable[MatrixView]) -> dict[str, tuple[int, int]]:
    """Return (m, n), the outputs and inputs, of each 2-D matrix by name."""
    return {ref.name: ref.shape for ref in matrix_refs(views)}


def by_parameter(refs: Iterable[MatrixRef]) -> Iterator[tuple[str, tuple[MatrixRef, ...]]]:
    """Yield neighbours of one parameter together, with the parameter's name."""
    for name, group in itertools.groupby(refs, key=lambda ref: ref.view.parameter_name):
        yield name, tuple(group)


def decomposition_cost(shape: tuple[int, int]) -> int:
    """Return the cost of decomposing an m × n matrix, in multiplications up to one factor."""
    m, n = shape
    return m * n * min(m, n, _MAX_COLUMNS)


def assign_rounds(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    world_size: int,
    *,
    names: Collection[str] | None = None,
) -> tuple[Round, ...]:
    """Divide the selected matrices over ranks by cost, in stacks of equal shape.

    Every rank computes the same division. All matrices of a parameter have the same owner, so that
    the parameter is gathered once. The most expensive parameter goes to the rank with the least
    work. In each round a rank has one stack. Experts come in order, and all matrices of one expert
    are next to each other, so that a round needs few rows of their parameter.

    Args:
        views: The views to read.
        parameters: The model's parameters by canonical name.
        world_size: The number of ranks that share the work.
        names: The 2-D matrices to include. None means all.
    """
    of_parameter: dict[str, list[MatrixRef]] = {}
    for ref in matrix_refs(views):
        if names is None or ref.name in names:
            of_parameter.setdefault(ref.view.parameter_name, []).append(ref)
    tasks = [sorted(refs, key=lambda ref: ref.expert or 0) for refs in of_parameter.values()]
    costs = [sum(decomposition_cost(ref.shape) for ref in refs) for refs in tasks]
    owners = owners_of(costs, world_size)
    queues = []
    for rank in range(world_size):
        own = (refs for refs, owner in zip(tasks, owners, strict=True) if owner == rank)
        queues.append(list(_chunks(itertools.chain.from_iterable(own), parameters)))
    return tuple(itertools.zip_longest(*queues, fillvalue=()))


def _chunks(
    refs: Iterable[MatrixRef], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[MatrixRef, ...]]:
    """Group matrices by shape, dtype and device, at most 64 MiB at a time."""
    groups: dict[tuple[object, ...], list[MatrixRef]] = {}
    for ref in refs:
        parameter = parameters[ref.view.parameter_name]
        groups.setdefault((ref.shape, parameter.dtype, parameter.device), []).append(ref)
    for group in groups.values():
        m, n = group[0].shape
        size = max(1, _MAX_ELEMENTS // (m * n))
        for first in range(0, len(group), size):
            yield tuple(group[first : first + size])


def expert_rows(refs: Iterable[MatrixRef]) -> slice | None:
    """Return the rows of the stored parameter that hold these experts, or None without experts."""
    experts = [ref.expert for ref in refs]
    found = [expert for expert in experts if expert is not None]
    return slice(min(found), max(found) + 1) if len(found) == len(experts) else None


def read_round(
    one_round: Round, parameters: Mapping[str, Tensor], backend: Backend
) -> Stack | None:
    """Return this rank's stack of a round, or None if it has none. The call is collective."""
    own: list[Tensor] = []
    for owner, refs in enumerate(one_round):
        for name, group in by_parameter(refs):
            rows = expert_rows(group)
            stored = backend.collect(parameters[name], owner, rows)
            if stored is not None:
                own += [ref.read(stored, 0 if rows is None else rows.start) for ref in group]
    if not own:
        return None
    # A single large matrix has a separate stack, and is not copied.
    return Stack(one_round[backend.rank], own[0][None] if len(own) == 1 else torch.stack(own))


def stacks(
    views: Sequence[MatrixView], parameters: Mapping[str, Tensor], backend: Backend
) -> Iterator[Stack]:
    """Yield all selected matrices on every rank, grouped by shape, at most 64 MiB at a time."""
    for chunk in _chunks(matrix_refs(views), parameters):
        yield Stack(chunk, gather(chunk, parameters, backend))


def gather(refs: Iterable[MatrixRef], parameters: Mapping[str, Tensor], backend: Backend) -> Tensor:
    """Return a copy of matrices of one shape on every rank, (len(refs), m, n). Collective."""
    matrices: list[Tensor] = []
    for name, group in by_parameter(refs):
        full = backend.full(parameters[name])
        matrices += [ref.read(full) for ref in group]
    return torch.stack(matrices)


def write_stack_(
    stack: Stack,
    matrices: Tensor,
    changed: Sequence[bool],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> None:
    """Write the changed matrices of a stack into the model, opening each parameter once.

    Args:
        stack: The stack that the matrices were read into.
        matrices: The new values of the matrices, (len(stack.names), m, n).
        changed: Whether to write each matrix. The others keep their bits.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    new = {
        ref: matrix
        for ref, matrix, is_new in zip(stack.refs, matrices, changed, strict=True)
        if is_new
    }
    for name, group in by_parameter(new):
        full = backend.full(parameters[name])
        for ref in group:
            ref.write_(full, new[ref])
        backend.write_back_(parameters[name], full)


def measure_each(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    backend: Backend,
    measure: Callable[[Tensor], Tensor],
    *,
    names: Collection[str] | None = None,
) -> dict[str, float]:
    """Return a number for each 2-D matrix by name. One rank measures it and sends it to all.

    Args:
        views: The views to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        measure: Maps a stack (b, m, n) to numbers of shape (b,).
        names: The 2-D matrices to measure, the same on every rank. None means all.
    """
    rows = measure_rows(
        views, parameters, backend, lambda w: measure(w).unsqueeze(-1), width=1, names=names
    )
    return {name: number for name, (number,) in rows.items()}


def measure_rows(
    views: Sequence[MatrixView],
    parameters: Mapping[str, Tensor],
    backend: Backend,
    measure: Callable[[Tensor], Tensor],
    *,
    width: int,
    names: Collection[str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Return ``width`` numbers for each 2-D matrix by name, and otherwise act as `measure_each`.

    Args:
        views: The views to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        measure: Maps a stack (b, m, n) to numbers of shape (b, width).
        width: The number of values for each matrix.
        names: The 2-D matrices to measure, the same on every rank. None means all.

    Raises:
        DecompositionError: Decompositions failed on some ranks, and no other error occurred.
        ElsewhereError: A different rank had an error, which that rank raises.
    """
    measured: list[str] = []
    numbers: list[Tensor] = []
    error: Exception | None = None
    for one_round in assign_rounds(views, parameters, backend.world_size, names=names):
        stack, found = read_round(one_round, parameters, backend), None
        if stack is not None:
            try:
                found = measure(stack.matrices)
            except Exception as caught:
                # If this rank raised the error now, the other ranks would wait in a collective
                # call. So it continues with them to the end, where all ranks raise.
                if error is None or isinstance(error, LinAlgError):
                    error = caught
        for owner, refs in enumerate(one_round):
            measured += [ref.name for ref in refs]
            zeros = torch.zeros(len(refs) * width)
            is_here = owner == backend.rank
            numbers.append(found.flatten() if is_here and found is not None else zeros)
    if not measured:
        return {}
    device = next(iter(parameters.values())).device
    has_failed = isinstance(error, LinAlgError)
    flags = torch.tensor([float(has_failed), float(error is not None and not has_failed)])
    every = torch.cat([number.to(device) for number in (*numbers, flags)])
    *host, num_failed, num_errors = backend.sum_to_host(every)
    if num_errors:
        raise_together(error)
    if num_failed:
        why = error or "a decomposition has failed on another rank"
        raise DecompositionError(str(why)) from error
    by_name = dict(zip(measured, zip(*[iter(host)] * width, strict=True), strict=True))
    return {name: by_name[name] for name in matrix_names(views) if name in by_name}


class DecompositionError(LinAlgError):  # type: ignore[misc]
    """A decomposition failed on some rank. Every rank raises this, so training can continue."""


def raise_together(error: Exception | None) -> NoReturn:
    """Raise the error of this rank, or `ElsewhereError` if a different rank had one.

    Raises:
        ElsewhereError: ``error`` is None.
    """
    if error is not None:
        raise error
    raise ElsewhereError(
        "Another rank has failed while it read its matrices, so this rank also stops. The log of "
        "that rank shows the cause."
    )
