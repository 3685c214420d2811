"""A weight matrix as a view of a parameter, LoRA products, and the selection of all views."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hf_pss.errors import SelectionError
from hf_pss.models.selection.layouts import RowPattern

Role: TypeAlias = Literal["attention", "mlp"]

_BLOCK_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a matrix that is inside some rows of the parameter that stores it.

    Attributes:
        stored: These rows as stored. For a stack they are the rows of the expert.
        rows: The index of the covered rows of the matrix.
        columns: The index of the covered columns of the matrix.
        index: The index of the piece in ``stored``.
        transposed: Whether ``stored`` has inputs first.
    """

    stored: Tensor
    rows: slice | Tensor
    columns: slice | Tensor
    index: tuple[slice | Tensor, ...]
    transposed: bool

    def read(self) -> Tensor:
        """Return the piece, (rows, columns) of the matrix. It may share memory."""
        found = self.stored[self.index]
        return found.mT if self.transposed else found

    def write_(self, piece: Tensor) -> None:
        """Overwrite the piece."""
        stored = piece.to(self.stored.dtype)
        self.stored[self.index] = stored.mT if self.transposed else stored


@dataclass(frozen=True, slots=True)
class MatrixView:
    """One weight matrix inside a parameter. It holds names and numbers, never tensors.

    Sharding replaces parameter objects after the selection, so look up the parameter by name each
    time: ``view.read(named_parameters_canonical(model)[view.parameter_name])``.

    Attributes:
        name: The unique name of the matrix. It is the parameter's name. If the parameter holds
            several matrices, the part follows in brackets:
            ``transformer.h.0.attn.c_attn.weight[q]``.
        parameter_name: The canonical name of the parameter, without the prefixes of wrappers.
        role: The part of the block that uses the matrix, attention or MLP.
        block: The name of the repeated block that holds the matrix.
        shape: ``(..., m, n)`` with m outputs and n inputs. Experts come first.
        transposed: Whether the parameter stores (in, out), as GPT-2's Conv1D does.
        rows: The output rows of the parameter that belong to the matrix. None means all.
        reason: The reason for the selection and the division, in words.
    """

    name: str
    parameter_name: str
    role: Role
    block: str
    shape: tuple[int, ...]
    transposed: bool
    rows: RowPattern | None
    reason: str

    def read(self, parameter: Tensor) -> Tensor:
        """Return the matrix inside a tensor that is laid out like the parameter.

        Args:
            parameter: A tensor with the full stored shape and any dtype: the parameter, its
                gradient or its momentum.

        Returns:
            The matrix, (..., m, n), detached. It shares the parameter's memory if the rows
            are evenly spaced, and is a copy if they come in runs. Change the parameter
            only through `write_`.

        Raises:
            SelectionError: The tensor does not have the parameter's full shape.

        Example:
            >>> stored = torch.arange(12.0).reshape(6, 2)  # two heads of [q|k|v], one row each
            >>> rows = RowPattern(start=1, size=1, period=3)
            >>> k = MatrixView("w[k]", "w", "attention", "h.0", (2, 2), False, rows, "")
            >>> k.read(stored).tolist()
            [[2.0, 3.0], [8.0, 9.0]]
        """
        part = self._part(parameter)
        return part if self.rows is None else part.flatten(-3, -2)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        """Overwrite the matrix inside a tensor laid out like the parameter, and no other entry.

        Args:
            parameter: A tensor with the full stored shape. It is written in
                place, outside autograd.
            matrix: (..., m, n), as `read` returns it. It is cast to the
                parameter's dtype and device.

        Raises:
            SelectionError: One of the tensors does not have the expected shape.
        """
        if tuple(matrix.shape) != self.shape:
            raise SelectionError(
                f"{self.name} has the shape {self.shape}, but a matrix of shape "
                f"{tuple(matrix.shape)} was given: write one of the shape that `read` returns."
            )
        if self.rows is not None:
            matrix = torch.unflatten(matrix, -2, (-1, self.rows.size))
        with torch.no_grad():
            self._part(parameter).copy_(matrix)

    def piece(self, stored: Tensor, start: int, expert: int | None = None) -> Piece | None:
        """Return the part of the matrix in some rows of the stored parameter, or None without one.

        Args:
            stored: The rows of the parameter from ``start`` on, along its first dimension. For a
                stack this is the dimension of experts.
            start: The number of the first row.
            expert: The number of the expert in a stack.
        """
        if expert is not None:
            if not start <= expert < start + len(stored):
                return None
            stored, start = stored[expert - start], 0
        if len(stored) == 0:
            return None
        everything = slice(None)
        if self.transposed:
            columns = slice(start, start + len(stored))
            outputs = everything if self.rows is None else self.stored_rows(stored.device)
            return Piece(stored, everything, columns, (everything, outputs), True)
        if self.rows is None:
            rows = slice(start, start + len(stored))
            return Piece(stored, rows, everything, (everything,), False)
        at = self.stored_rows(stored.device) - start
        held = ((at >= 0) & (at < len(stored))).nonzero().squeeze(-1)
        return Piece(stored, held, everything, (at[held],), False) if len(held) else None

    def stored_rows(self, device: torch.device | None = None) -> Tensor:
        """Return the stored output row of each row of the matrix, (m,), int64."""
        m = self.shape[-2]
        return (
            torch.arange(m, device=device)
            if self.rows is None
            else self.rows.stored_rows(m, device)
        )

    def _part(self, parameter: Tensor) -> Tensor:
        """Return a view that always shares memory: (..., m, n), or (..., periods, size, n)."""
        *experts, m, n = self.shape
        if self.rows is not None:
            m = m // self.rows.size * self.rows.period
        stored, given = (*experts, *((n, m) if self.transposed else (m, n))), tuple(parameter.shape)
        if given != stored:
            raise SelectionError(
                f"{self.parameter_name} was selected with the shape {stored}, but a tensor of "
                f"shape {given} was given: pass the full parameter, gathered from its shards."
            )
        matrix = parameter.detach()
        if self.transposed:
            matrix = matrix.mT
        if self.rows is None:
            return matrix
        periods = torch.unflatten(matrix, -2, (-1, self.rows.period))
        return periods.narrow(-2, self.rows.start, self.rows.size)


@dataclass(frozen=True, slots=True)
class AdapterView:
    """The product s·B·A of an adapter. It holds names and numbers, never tensors.

    Attributes:
        name: The adapted module with the adapter in brackets: ``…q_proj[default]``. If there are
            several experts, the number of the expert follows: ``…experts.down_proj[default][2]``.
        left_name: The canonical name of B's parameter, (m, r), or (m, r·E) for E experts.
        right_name: The canonical name of A's parameter, (r, n), or (E·r, n).
        base_name: The canonical name of the frozen weight, or None if it is not a plain parameter.
        scaling: The factor s.
        shape: The shape (m, n) of the product.
        num_experts: E, which is 1 for a linear map.
        expert: The number of the expert.
    """

    name: str
    left_name: str
    right_name: str
    base_name: str | None
    scaling: float
    shape: tuple[int, int]
    num_experts: int = 1
    expert: int = 0

    @property
    def names(self) -> tuple[str, str, str]:
        """The names that a pattern may match: that of the product and those of its factors."""
        return self.name, self.left_name, self.right_name


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A parameter or a part of one that was not selected, and the reason."""

    parameter_name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The weight matrices of a model, in its order, and all other parameters."""

    matrices: tuple[MatrixView, ...]
    exclusions: tuple[Exclusion, ...]
    adapters: tuple[AdapterView, ...] = ()
    """The products of LoRA factors. No parameter holds them."""

    def table(self) -> str:
        """Return an aligned text table: name, shape, role, reason.

        Exclusions share a line if they differ only in the number of their block.
        """
        matrices = [(v.name, _dimensions(v.shape), v.role, v.reason) for v in self.matrices]
        alike = Counter(
            (_BLOCK_INDEX.sub("*", e.parameter_name), _dimensions(e.shape), e.reason)
            for e in self.exclusions
        )
        excluded = [
            (name, shape, "excluded", reason if count == 1 else f"{reason} (× {count})")
            for (name, shape, reason), count in alike.items()
        ]
        products = [
            (view.name, _dimensions(view.shape), "adapter", "product of LoRA's factors")
            for view in self.adapters
        ]
        lines = [("name", "shape", "role", "reason"), *matrices, *products, *excluded]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
            for line in lines
        )


def _dimensions(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
