"""Weight matrices in stacks of equal shape, so that a batched call serves a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend
from hf_pss.selection import MatrixView

__all__ = ["Stack", "gather", "matrix_names", "matrix_shapes", "stacks", "write_stack_"]

# fp32 elements in one batched call (256 MiB): bounds the extra memory of a whole-model reading.
_MAX_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one 2-D matrix of a stack came from: a view, and which expert of it (None: all)."""

    name: str
    view: MatrixView
    expert: int | None


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one shape: ``matrices`` is (len(names), m, n), a copy in the stored dtype."""

    slots: tuple[_Slot, ...]
    matrices: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices' names, in the order of the stack."""
        return tuple(slot.name for slot in self.slots)

    def where(self, kept: Sequence[bool]) -> Self:
        """Return the stack of those matrices for which ``kept`` is true."""
        index = [i for i, keep in enumerate(kept) if keep]
        return type(self)(self.where_slots(kept), self.matrices[index])

    def where_slots(self, kept: Sequence[bool]) -> tuple[_Slot, ...]:
        """Return the slots for which ``kept`` is true."""
        return tuple(slot for slot, keep in zip(self.slots, kept, strict=True) if keep)


def _slots(view: MatrixView) -> list[_Slot]:
    if len(view.shape) == 2:
        return [_Slot(view.name, view, None)]
    return [_Slot(f"{view.name}[{expert}]", view, expert) for expert in range(view.shape[0])]


def matrix_names(views: Sequence[MatrixView]) -> tuple[str, ...]:
    """Return a name for each 2-D matrix: the view's, with ``[e]`` for each expert of a stack."""
    return tuple(slot.name for view in views for slot in _slots(view))


def matrix_shapes(views: Sequence[MatrixView]) -> dict[str, tuple[int, int]]:
    """Return (m, n), outputs and inputs, for each 2-D matrix by name."""
    return {s.name: (v.shape[-2], v.shape[-1]) for v in views for s in _slots(v)}


def stacks(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    *,
    names: Collection[str] | None = None,
) -> Iterator[Stack]:
    """Yield the selected matrices, grouped by shape, dtype and device, at most 256 MiB at a time.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
        names: Only these 2-D matrices; all when None.
    """
    groups: dict[tuple[object, ...], list[_Slot]] = {}
    for view in views:
        parameter = parameters[view.parameter_name]
        key = (view.shape[-2:], parameter.dtype, parameter.device)
        wanted = (slot for slot in _slots(view) if names is None or slot.name in names)
        groups.setdefault(key, []).extend(wanted)
    for slots in groups.values():
        if not slots:
            continue
        m, n = slots[0].view.shape[-2:]
        size = max(1, _MAX_ELEMENTS // (m * n))
        for first in range(0, len(slots), size):
            chunk = tuple(slots[first : first + size])
            yield Stack(chunk, gather(chunk, parameters, backend))


def gather(slots: Sequence[_Slot], parameters: Mapping[str, Tensor], backend: Backend) -> Tensor:
    """Return the matrices of these slots, (len(slots), m, n), a copy in the stored dtype."""
    matrices = []
    for view, group in itertools.groupby(slots, key=lambda slot: slot.view):
        whole = view.read(backend.full(parameters[view.parameter_name]))
        matrices += [whole if slot.expert is None else whole[slot.expert] for slot in group]
    return torch.stack(matrices)


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
