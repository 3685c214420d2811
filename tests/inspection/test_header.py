from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from files import entry, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_pss.errors import StateError
from hf_pss.runs.safetensors_files import (
    MAX_HEADER_BYTES,
    READABLE,
    TensorEntry,
    read_header,
    read_pieces,
)

DTYPES = [dtype for dtype in READABLE.values()]


def numbers(entry: TensorEntry) -> torch.Tensor:
    return torch.cat([*read_pieces(entry), torch.empty(0, dtype=READABLE[entry.dtype])])


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    written = {f"t{i}.{dtype}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(DTYPES)} | {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
        "ids": torch.arange(3),
    }
    path = tmp_path / "model.safetensors"
    save_file(written, path, metadata={"format": "pt"})
    entries = {entry.name: entry for entry in read_header(path)}
    assert entries.keys() == written.keys()
    for name, tensor in load_file(path).items():
        found = entries[name]
        assert found.shape == tuple(tensor.shape)
        if found.dtype in READABLE:
            same = numbers(found).view(torch.uint8) == tensor.flatten().view(torch.uint8)
            assert bool(same.all())


GOOD = {"a": entry(0, 4), "b": entry(4, 6)}
BROKEN: list[tuple[Any, bytes, str]] = [
    (GOOD, b"12345", "truncated"),
    (GOOD, b"1234567", "1 bytes more"),
    ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "overlap"),
    ({"a": entry(0, 4), "b": entry(5, 6)}, b"123456", "leave a hole"),
    ({"a": entry(1, 6)}, b"123456", "leave a hole"),
    ({"a": entry(0, 6, [2, 2])}, b"123456", "does not take"),
    ({"a": entry(0, 3, [2, 3], "F4")}, b"1234", "1 bytes more"),
    ({"a": entry(0, 1, [1], "F4")}, b"1", "does not take"),
    ({"a": entry(0, 6, dtype="F31")}, b"123456", "F31"),
    ({"a": entry(0, 6, dtype="X\x1b[2J")}, b"123456", r"X\\x1b\[2J"),
    ({"a": entry(0, 6, [-6])}, b"123456", "whole numbers"),
    ({"a": entry(0, 6, [6.0])}, b"123456", "whole numbers"),  # type: ignore[list-item]
    ({"a": entry(0, 1, [True])}, b"1", "whole numbers"),
    ({"a": entry(6, 0, [0])}, b"123456", "does not take"),
    ({"a": entry(0, 2**62)}, b"123456", "truncated"),
    ({"a": entry(0, 2**63)}, b"123456", "at most 16 whole numbers"),
    ({"a": entry(0, 6, [2] * 17)}, b"123456", "at most 16 whole numbers"),
    ({"a": entry(0, 6) | {"more": 1}}, b"123456", "nothing else"),
    ({"a": {"dtype": "U8"}}, b"123456", "nothing else"),
    ({"a": [1, 2]}, b"123456", "nothing else"),
    ({"__metadata__": {"step": 1}}, b"", "text to text"),
    ({"__metadata__": [1]}, b"", "text to text"),
    (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
     b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"12", "'a' appears twice"),
    (b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', b"12", "'dtype'"),
    (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"12", "NaN is not a number"),
    (b"[1]", b"", "holds a list"),
    (b'{"a"', b"", "not valid JSON"),
    (b'{"\xff": 1}', b"", "not valid JSON"),
    (b'{"a":' + b"[" * 200_000, b"", "nested too deeply|not valid JSON"),
    (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "message"), BROKEN)
def test_damage_is_named(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(StateError, match=message):
        read_header(path)


def test_the_good_twin_of_the_damaged_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", GOOD, b"123456")
    assert [one.name for one in read_header(path)] == ["a", "b"]


@pytest.mark.parametrize("shape", ["9" * 4300, ",".join(["2"] * 200_000)])
def test_sizes_whose_product_takes_for_ever(tmp_path: Path, shape: str) -> None:
    """Neither multiplied (quadratic) nor printed (Python refuses beyond 4,300 digits)."""
    header = f'{{"a":{{"dtype":"U8","shape":[{shape},2],"data_offsets":[0,1]}}}}'
    path = write_raw(tmp_path / "model.safetensors", header.encode(), b"1")
    with pytest.raises(StateError, match="at most 16 whole numbers"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_room_for_a_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * size)
    with pytest.raises(StateError, match=f"ends after {size} bytes"):
        read_header(path)


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 2**63])
def test_an_oversize_header_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(StateError, match=f"header of {size} bytes"):
        read_header(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(StateError, match="its header alone needs 1008 bytes"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(4, 4)}, path)
    (found,) = read_header(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StateError, match="became shorter"):
        numbers(found)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_a_state_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a good file replaced, removed or added, within the header and at the file's end."""
    header = json.dumps(GOOD).encode()
    good = len(header).to_bytes(8, "little") + header + b"123456"
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(start + 6, len(good))))
    damaged = good[:start] + data.draw(st.binary(max_size=6)) + good[stop:]
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(damaged)
    try:
        entries = read_header(path)
    except StateError:
        return
    reached = max((entry.offset + entry.num_bytes for entry in entries), default=len(damaged))
    assert reached == len(damaged)
    with safe_open(path, "pt") as library:  # the library accepts every file that we accept
        assert sorted(library.keys()) == sorted(entry.name for entry in entries)
