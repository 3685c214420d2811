"""The header of a safetensors file, judged in full before a byte of a tensor is read.

The format (github.com/huggingface/safetensors, "Format"): eight bytes, little endian, the header's
size; the header, one JSON object that maps a name to ``dtype``, ``shape`` and ``data_offsets``; the
tensors' bytes, without holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_pss.errors import StateError
from hf_pss.inspection.names import visible
from hf_pss.inspection.strict_json import parse_object

__all__ = ["DTYPE_BITS", "TensorEntry", "read_header"]

# The format allows 100 MB; ours is lower, for parsed JSON takes several times its size. Every one
# of 90,000 tensors, as many as the largest models have, may take 350 bytes of it.
MAX_HEADER_BYTES = 32 * 2**20
_PREFIX_BYTES = 8
_METADATA = "__metadata__"
# Beyond both, products take hours and have more digits than Python prints. The limits are ours.
_MOST_DIMENSIONS = 16
_MAX_SIZE = 2**63 - 1
_SIZES = (
    f"shape and data_offsets are lists of at most {_MOST_DIMENSIONS} whole numbers, none negative "
    "or above 2^63 - 1"
)

# Of safetensors 0.8: what may appear; what of it can be read here is told in `reading`.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **{"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64},
        **{"U64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
        **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
        **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    }
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: what it is called, and where its bytes lie."""

    name: str
    dtype: str
    """A key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte, from the file's beginning."""
    num_bytes: int


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """Read and judge the header of one file; cost: the header, no tensor.

    Args:
        path: A .safetensors file.

    Returns:
        Its tensors, in the order of their bytes.

    Raises:
        StateError: The file is truncated or longer than it says, the header is too large, is not
            strict JSON or has a duplicate key, a dtype is unknown, or the tensors' bytes overlap,
            leave holes, or do not fit dtype and shape.
        OSError: It cannot be read.
    """
    what = visible(path)
    if not path.is_file():  # opening a pipe would wait for ever
        raise _damaged(what, "it is no regular file")
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        prefix = stream.read(_PREFIX_BYTES)
        if len(prefix) < _PREFIX_BYTES:
            raise _damaged(what, f"it ends after {size} bytes, before a header could begin")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise _damaged(
                what,
                f"it announces a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are "
                "read",
            )
        if _PREFIX_BYTES + header_bytes > size:
            raise _damaged(
                what,
                f"truncated: its header alone needs {_PREFIX_BYTES + header_bytes} bytes, the file "
                f"has {size}",
            )
        header = parse_object(stream.read(header_bytes), what=f"The header of {what}")
    _check_metadata(what, header.pop(_METADATA, {}))
    data_begins = _PREFIX_BYTES + header_bytes
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
        raise _damaged(what, f"the dtype {visible(dtype)} is not one of safetensors'")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(what, _SIZES)
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        raise _damaged(
            what,
            f"{dtype} of shape {visible(shape)} does not take the {stop - start} bytes that its "
            "offsets span",
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_begins + start, stop - start)


def _are_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    # `type`, for True is an int, too.
    return all(type(n) is int and 0 <= n <= _MAX_SIZE for n in value)


def _check_metadata(what: str, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(what, f"{_METADATA} maps text to text")


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
