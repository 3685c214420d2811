"""Read the numbers of one matrix from its file, in pieces of bounded size.

Plain reads, no memory map: pages of a map count as the process's memory for as long as the file is
open, and a file that another program cuts short ends a process that maps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import FileIO
from types import MappingProxyType

import torch
from torch import Tensor

from hf_pss.errors import StateError
from hf_pss.inspection.header import TensorEntry
from hf_pss.inspection.names import visible
from hf_pss.selection import RowPattern

__all__ = ["PIECE_BYTES", "READABLE", "MatrixReader", "read_pieces"]

READABLE: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)

# Of one piece in the precision that is computed with.
PIECE_BYTES = 64 * 2**20
# Rows are read in one go, columns a row at a time: beyond this width the columns of a basis, which
# are as long as a row, are the greater evil. Ours.
WIDE_RATIO = 16


@dataclass(frozen=True, slots=True)
class MatrixReader:
    """Reads a matrix by the rows that its tensor is stored in.

    Attributes:
        entry: Its tensor, 2-D or 3-D, of a readable dtype.
        stored_shape: Of one matrix as stored, before any part is taken.
        transposed: Whether output rows are stored as columns.
        rows: Output rows that belong to it; None for all.
    """

    entry: TensorEntry
    stored_shape: tuple[int, int]
    transposed: bool
    rows: RowPattern | None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed with: float64 for float64, float32 for everything narrower."""
        return torch.float64 if self.entry.dtype == "F64" else torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, as stored."""
        height, width = self.stored_shape
        if self.rows is None:
            return height, width
        share = Fraction(self.rows.size, self.rows.period)
        return (height, int(width * share)) if self.transposed else (int(height * share), width)

    def pieces(self, expert: int = 0) -> Iterator[Tensor]:
        """Yield the matrix as stored, rows in order, (rows, columns) at most `PIECE_BYTES` each.

        Args:
            expert: Which of a stack.

        Raises:
            StateError: The file has become shorter since its header was read.
        """
        height, width = self.stored_shape
        most = max(1, PIECE_BYTES // (width * self.dtype.itemsize))
        with self.entry.path.open("rb", buffering=0) as stream:
            for start, stop in self._runs(height):
                for row in range(start, stop, most):
                    num_rows = min(most, stop - row)
                    stream.seek(self._offset(expert, row, 0))
                    raw = _read(stream, num_rows * width, self.entry)
                    yield self._columns(raw.view(num_rows, width)).to(self.dtype)

    def strips(self, expert: int = 0) -> Iterator[Tensor]:
        """Yield the columns of the matrix as stored, as rows: pieces of its transpose.

        Cost: a read for every row of every piece.

        Args:
            expert: Which of a stack.

        Raises:
            StateError: The file has become shorter since its header was read.
        """
        height, width = self.stored_shape
        rows = [row for run in self._runs(height) for row in range(*run)]
        most = max(1, PIECE_BYTES // (len(rows) * self.dtype.itemsize))
        with self.entry.path.open("rb", buffering=0) as stream:
            for column in range(0, width, most):
                num_columns = min(most, width - column)
                strip = torch.empty(len(rows), num_columns, dtype=READABLE[self.entry.dtype])
                for target, row in zip(strip, rows, strict=True):
                    stream.seek(self._offset(expert, row, column))
                    _fill(target, stream, self.entry)
                yield strip.to(self.dtype).mT

    def tall_pieces(
        self, expert: int = 0, *, wide_ratio: float = WIDE_RATIO
    ) -> tuple[Callable[[], Iterator[Tensor]], int]:
        """Return what goes over the matrix in pieces of few columns, and how many they have.

        They are `pieces`, or `strips` where it is more than `wide_ratio` times as wide as high:
        a matrix and its transpose have the same singular values.
        """
        height, width = self.shape
        # The parts of a transposed tensor are columns, and none of them is wide.
        if width > wide_ratio * height and not (self.transposed and self.rows):
            return partial(self.strips, expert), height
        return partial(self.pieces, expert), width

    def whole(self, expert: int = 0) -> Tensor:
        """Return the matrix as stored, in one tensor; at its peak, one piece more than that."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        done = 0
        for piece in self.pieces(expert):
            whole[done : done + len(piece)] = piece
            done += len(piece)
        return whole

    def _offset(self, expert: int, row: int, column: int) -> int:
        height, width = self.stored_shape
        numbers = (expert * height + row) * width + column
        return self.entry.offset + numbers * READABLE[self.entry.dtype].itemsize

    def _runs(self, height: int) -> Iterator[tuple[int, int]]:
        if self.rows is None or self.transposed:
            yield 0, height
            return
        for start in range(self.rows.start, height, self.rows.period):
            yield start, start + self.rows.size

    def _columns(self, piece: Tensor) -> Tensor:
        if self.rows is None or not self.transposed:
            return piece
        start, size, period = self.rows.start, self.rows.size, self.rows.period
        return piece.view(len(piece), -1, period)[:, :, start : start + size].flatten(1)


def read_pieces(entry: TensorEntry) -> Iterator[Tensor]:
    """Yield a tensor's numbers, (numbers,), in pieces; any shape, also none at all.

    A piece takes `PIECE_BYTES` at most once it is float32, or is float64.
    """
    itemsize = READABLE[entry.dtype].itemsize
    left, most = entry.num_bytes // itemsize, PIECE_BYTES // max(itemsize, 4)
    with entry.path.open("rb", buffering=0) as stream:
        stream.seek(entry.offset)
        while left:
            count = min(left, most)
            yield _read(stream, count, entry)
            left -= count


def _read(stream: FileIO, count: int, entry: TensorEntry) -> Tensor:
    numbers = torch.empty(count, dtype=READABLE[entry.dtype])
    _fill(numbers, stream, entry)
    return numbers


def _fill(numbers: Tensor, stream: FileIO, entry: TensorEntry) -> None:
    target = numbers.view(torch.uint8).numpy().data
    done = 0
    while done < len(target):
        got = stream.readinto(target[done:])
        if not got:
            raise StateError(
                f"{visible(entry.path)} became shorter while it was read. Wait until it is "
                "written in full."
            )
        done += got
