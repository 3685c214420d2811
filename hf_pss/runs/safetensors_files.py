"""Read the headers and tensors of safetensors files, which may come from anyone.

A header is checked completely before any tensor is read. The format is described in
github.com/huggingface/safetensors, section "Format". A file begins with eight little-endian bytes
that hold the size of the header. The header follows, a JSON object that maps each name to
``dtype``, ``shape`` and ``data_offsets``. The bytes of the tensors come last and leave no holes.

This module does not use ``safe_open`` of the safetensors library, because that function maps the
file into memory. Mapped pages count as memory of the process, and the system kills the process if
another program cuts the file short.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError, StateError
from hf_pss.models.selection import RowPattern
from hf_pss.records.strict_json import parse_object, read_object, visible
from hf_pss.runs.folder import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, leads_out, step_by_name

# The format allows 100 MB. This limit is lower, because parsed JSON takes several times its size.
# It leaves 350 bytes for each of 90,000 tensors, which is the number in the largest models.
MAX_HEADER_BYTES = MAX_INDEX_BYTES
_PREFIX_BYTES = 8
_METADATA = "__metadata__"
# Beyond these limits, which we chose, the product of a shape takes hours to compute and has more
# digits than Python prints.
_MOST_DIMENSIONS = 16
_MAX_SIZE = 2**63 - 1

# All dtypes of safetensors 0.8. `READABLE` lists the real floating ones. F4 and F6 are not among
# them, because they have neither NaN nor inf.
DTYPE_BITS: Mapping[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64},
    **{"U64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The name, dtype, shape and position of one tensor in a file."""

    name: str
    dtype: str
    """A key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """The position of the first byte, counted from the beginning of the file."""
    num_bytes: int


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """Read and check the header of one file, without reading any tensor.

    Args:
        path: A .safetensors file.

    Returns:
        The tensors of the file, in the order of their bytes.

    Raises:
        StateError: The file is damaged. Its size differs from what the header states; the header is
            too large, is not strict JSON or has a duplicate key; a dtype is unknown; or the bytes
            of the tensors overlap, leave holes, or do not fit the dtype and shape.
        OSError: The file cannot be read.
    """
    what = visible(path)
    if not path.is_file():  # opening a pipe would block
        raise _damaged(what, "it is not a regular file")
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        prefix = stream.read(_PREFIX_BYTES)
        if len(prefix) < _PREFIX_BYTES:
            raise _damaged(what, f"it ends after {size} bytes, before a header could begin")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            limit = f"at most {MAX_HEADER_BYTES} are read"
            raise _damaged(what, f"it announces a header of {header_bytes} bytes; {limit}")
        data_begins = _PREFIX_BYTES + header_bytes
        if data_begins > size:
            needs = f"its header alone needs {data_begins} bytes"
            raise _damaged(what, f"truncated: {needs}, the file has {size}")
        header = parse_object(stream.read(header_bytes), what=f"The header of {what}")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(what, f"{_METADATA} maps text to text")
    entries = [_entry(path, data_begins, name, row) for name, row in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_cover(what, entries, data_begins, size)
    return tuple(entries)


def _entry(path: Path, data_begins: int, name: str, row: object) -> TensorEntry:
    what = f"{visible(path)}, tensor {visible(name)}"
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(what, "an entry has dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(what, f"safetensors has no dtype {visible(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        sizes = f"at most {_MOST_DIMENSIONS} whole numbers, none negative or above 2^63 - 1"
        raise _damaged(what, f"shape and data_offsets are lists of {sizes}")
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        span = f"the {stop - start} bytes that its offsets span"
        raise _damaged(what, f"{dtype} of shape {visible(shape)} does not take {span}")
    return TensorEntry(name, dtype, tuple(shape), path, data_begins + start, stop - start)


def _are_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    # `type` instead of isinstance, because True is an instance of int.
    return all(type(n) is int and 0 <= n <= _MAX_SIZE for n in value)


def _check_cover(what: str, entries: list[TensorEntry], data_begins: int, size: int) -> None:
    reached = data_begins
    for entry in entries:
        if entry.offset != reached:
            kind = "overlap" if entry.offset < reached else "leave a hole"
            raise _damaged(what, f"its tensors' bytes {kind} before {visible(entry.name)}")
        reached += entry.num_bytes
    if reached > size:
        raise _damaged(what, f"truncated: its tensors need {reached} bytes, the file has {size}")
    if reached < size:
        raise _damaged(what, f"it has {size - reached} bytes more than its tensors take")


def _damaged(what: str, why: Any) -> StateError:
    return StateError(f"{what} is damaged: {why}. Fetch or save it again.")


_INDEX, _WEIGHTS, _CONFIG = ".safetensors.index.json", ".safetensors", "config.json"
_PREFERRED = ("model", "adapter_model", "diffusion_pytorch_model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_MAX_REF_BYTES = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The header entries of a checkpoint's tensors, and its config as plain JSON."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    """The tensors, in the order of the files and of the bytes in each file."""
    config: Mapping[str, Any]
    """The content of config.json, or empty if there is none. Only numbers and
    ``model_type`` are used."""

    @property
    def model_type(self) -> str | None:
        """The ``model_type`` of config.json, if it is text."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read all headers and the index of a checkpoint, without reading any tensor.

    Args:
        path: A .safetensors file, an index file (*.safetensors.index.json), or a folder that holds
            either of them. In the cache of the Hub it may also be ``models--…/snapshots/<commit>``,
            or ``models--…``, which stands for the commit of ``refs/main`` or for the only commit.

    Raises:
        ConfigurationError: The path holds no safetensors files. It may hold only pickles, only
            checkpoints of several steps, or nothing.
        StateError: A file is damaged, or the index names a file outside of its folder.
        OSError: A file cannot be read.
    """
    if path.is_dir():
        return _open_folder(_commit_of(path))
    if not path.exists():
        raise ConfigurationError(
            f"There is no {visible(path)}. Give a checkpoint's folder or file."
        )
    if path.name.endswith(_INDEX):
        return _open_index(path)
    if path.suffix != _WEIGHTS:
        raise ConfigurationError(_refusal(visible(path)))
    return _checkpoint(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    def rank(path: Path) -> tuple[int, str]:
        stem = path.name.split(".")[0]
        return (*_PREFERRED, stem).index(stem), path.name

    indices = sorted(folder.glob(f"*{_INDEX}"), key=rank)
    weights = sorted(folder.glob(f"*{_WEIGHTS}"), key=rank)
    whole = [path for path in weights if path.name.removesuffix(_WEIGHTS) in _PREFERRED]
    if whole:
        return _checkpoint(folder, [_confined(whole[0], folder)])
    if indices:
        return _open_index(indices[0], shown=folder)
    if weights:
        return _checkpoint(folder, [_confined(path, folder) for path in weights])
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise ConfigurationError(_refusal(f"{visible(folder)} holds pickles only and"))
    parents = {found.parent for found in folder.glob(f"*/*{_WEIGHTS}")}
    inside = sorted(parents, key=lambda parent: (step_by_name(parent) or 0, parent.name))
    names = ", ".join(visible(parent.name) for parent in inside)
    hint = f" Give one of its folders: {names}." if names else ""
    raise ConfigurationError(f"{visible(folder)} holds no .safetensors file.{hint}")


def _open_index(index: Path, *, shown: Path | None = None) -> Checkpoint:
    folder = index.parent
    listed = read_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise StateError(f"{visible(index)} is damaged: weight_map maps tensors to files.")
    if bad := [name for name in listed.values() if not isinstance(name, str)]:
        raise StateError(f"{visible(index)} is damaged: {visible(bad[0])} is not a name.")
    shards = {name: _shard(index, name) for name in dict.fromkeys(listed.values())}
    checkpoint = _checkpoint(shown or index, [shards[name] for name in sorted(shards)], folder)
    held = {entry.name: entry.path for entry in checkpoint.tensors}
    for tensor, shard in listed.items():
        if held.get(tensor) != shards[shard]:
            raise StateError(
                f"{visible(index)} lists {visible(tensor)} in {visible(shard)}, which does not "
                "hold it: files of two checkpoints were mixed, or one is damaged."
            )
    return checkpoint


def _shard(index: Path, name: str) -> Path:
    inner = PurePosixPath(name)
    foreign = inner.is_absolute() or PureWindowsPath(name).anchor or "\\" in name or "\0" in name
    if foreign or ".." in inner.parts or inner.suffix != _WEIGHTS:
        raise StateError(
            f"{visible(index)} names {visible(name)}; a shard is a .safetensors file inside the "
            "checkpoint's own folder, by a relative path. It is not opened."
        )
    path = index.parent / inner
    if not path.is_file():
        raise StateError(f"{visible(index)} names {visible(name)}, which is missing.")
    return _confined(path, index.parent)


def _confined(path: Path, folder: Path) -> Path:
    # In the cache of the Hub, the files of a snapshot are links to ../../blobs. No other link may
    # lead out of the folder.
    own = Path(os.path.realpath(folder))
    blobs = [own.parent.parent / "blobs"] if own.parent.name == "snapshots" else []
    if all(leads_out(path, root) for root in (folder, *blobs)):
        raise StateError(
            f"{visible(path)} is a link that leads out of its folder. It is not opened: copy the "
            "file to where the link is."
        )
    return path


def _checkpoint(path: Path, files: list[Path], folder: Path | None = None) -> Checkpoint:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in entries:
                raise StateError(
                    f"{visible(entry.name)} lies in {visible(entries[entry.name].path)} and in "
                    f"{visible(file)}: files of two checkpoints were mixed. Give one of the files."
                )
            entries[entry.name] = entry
    return Checkpoint(path, tuple(entries.values()), _config(folder or files[0].parent))


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    # transformers 4 writes Infinity for the time_step_limit of Mamba-2, Bamba and Falcon-H1.
    own = _confined(path, folder)
    return read_object(own, max_bytes=MAX_CONFIG_BYTES, allow_nonfinite=True)


def _commit_of(folder: Path) -> Path:
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    commits = [path for path in sorted(snapshots.iterdir()) if path.is_dir()]
    main = folder / "refs" / "main"
    if main.is_file():
        with main.open("rb") as stream:
            name = stream.read(_MAX_REF_BYTES).decode("ascii", "replace").strip()
        commits = [path for path in commits if path.name == name and _COMMIT.fullmatch(name)]
    if len(commits) != 1:
        raise ConfigurationError(
            f"{visible(folder)} holds {len(commits)} possible snapshots. Give one of them: "
            f"{visible(snapshots)}/<commit>."
        )
    return commits[0]


def _refusal(what: str) -> str:
    return (
        f"{what} is not read: only .safetensors files are opened, because a pickle can run any "
        "program. If you trust it, convert it: from_pretrained, then save_pretrained."
    )


READABLE: Mapping[str, torch.dtype] = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    "F8_E8M0": torch.float8_e8m0fnu,
}

# The largest size of one piece in memory, in the precision of the computation.
PIECE_BYTES = 64 * 2**20
# Rows are read in one go, but columns need one read per row. If the width exceeds this many times
# the height, the columns of a basis, which are as long as a row, would cost more than these reads.
# We chose this number.
WIDE_RATIO = 16


@dataclass(frozen=True, slots=True)
class MatrixReader:
    """Reads a matrix from the rows in which its tensor is stored.

    Attributes:
        entry: The tensor, which has two or three dimensions and a readable dtype.
        stored_shape: The shape of one complete matrix as stored.
        transposed: Whether output rows are stored as columns.
        rows: The output rows that belong to the matrix, or None if all of them do.
    """

    entry: TensorEntry
    stored_shape: tuple[int, int]
    transposed: bool
    rows: RowPattern | None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the computation: float64 for a float64 tensor, otherwise float32."""
        return torch.float64 if self.entry.dtype == "F64" else torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix as stored."""
        height, width = self.stored_shape
        if self.rows is None:
            return height, width
        share = Fraction(self.rows.size, self.rows.period)
        return (height, int(width * share)) if self.transposed else (int(height * share), width)

    def pieces(self, expert: int = 0) -> Iterator[Tensor]:
        """Yield the matrix as stored, in pieces of shape (rows, columns), up to `PIECE_BYTES` each.

        Args:
            expert: The index of a matrix in a stack.

        Raises:
            StateError: The file has become shorter since its header was read.
        """
        height, width = self.stored_shape
        most = max(1, PIECE_BYTES // (width * self.dtype.itemsize))
        with self.entry.path.open("rb", buffering=0) as stream:
            for start, stop in self._runs(height):
                for row in range(start, stop, most):
                    num_rows = min(most, stop - row)
                    raw = _read(stream, self.entry, self._offset(expert, row, 0), num_rows * width)
                    yield self._columns(raw.view(num_rows, width)).to(self.dtype)

    def strips(self, expert: int = 0) -> Iterator[Tensor]:
        """Yield the transpose of the stored matrix in pieces, with one read per row of each piece.

        Args:
            expert: The index of a matrix in a stack.

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
                    offset = self._offset(expert, row, column)
                    target.copy_(_read(stream, self.entry, offset, num_columns))
                yield strip.to(self.dtype).mT

    def tall_pieces(
        self, expert: int = 0, *, wide_ratio: float = WIDE_RATIO
    ) -> tuple[Callable[[], Iterator[Tensor]], int]:
        """Return a function that yields pieces with few columns, and the number of their columns.

        The function is `pieces`, or `strips` if the width of the matrix is more than `wide_ratio`
        times its height. Both serve equally well, because a matrix and its transpose have the
        same singular values.
        """
        height, width = self.shape
        # The parts of a transposed tensor are columns, and none of these parts is wide.
        if width > wide_ratio * height and not (self.transposed and self.rows):
            return partial(self.strips, expert), height
        return partial(self.pieces, expert), width

    def whole(self, expert: int = 0) -> Tensor:
        """Return the stored matrix as one tensor. Memory holds the matrix and one piece."""
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
    """Yield the numbers of a tensor of any shape, in one-dimensional pieces.

    A piece takes at most `PIECE_BYTES` as float32, or as float64 if that is its dtype.
    """
    itemsize = READABLE[entry.dtype].itemsize
    total, most = entry.num_bytes // itemsize, PIECE_BYTES // max(itemsize, 4)
    with entry.path.open("rb", buffering=0) as stream:
        for first in range(0, total, most):
            count = min(most, total - first)
            yield _read(stream, entry, entry.offset + first * itemsize, count)


@torch.no_grad()
def count_nonfinite(entry: TensorEntry) -> int:
    """Count NaN and inf in a tensor of any shape and a readable dtype, in one pass."""
    wide = torch.float64 if entry.dtype == "F64" else torch.float32  # 1e300 is finite
    return sum(int((~piece.to(wide).isfinite()).sum()) for piece in read_pieces(entry))


def _read(stream: FileIO, entry: TensorEntry, offset: int, count: int) -> Tensor:
    numbers = torch.empty(count, dtype=READABLE[entry.dtype])
    stream.seek(offset)
    target = numbers.view(torch.uint8).numpy().data
    done = 0
    while done < len(target):
        got = stream.readinto(target[done:])
        if not got:
            raise StateError(
                f"{visible(entry.path)} became shorter while it was read. Wait until it is "
                "complete."
            )
        done += got
    return numbers
