"""The file of rows: strict JSON, whole lines, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from sweep_rows import row

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.rows import Row, append_row, drop_unfinished_line, read_rows


def test_a_row_comes_back_as_it_was() -> None:
    before = row(loss=None, interventions=(3,), extra={"fault_start": 2}, versions={"torch": "2"})
    assert Row.from_line(before.to_line()) == before


def test_a_number_that_is_not_finite_never_gets_into_the_file() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        row(loss=math.nan).to_line()


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row(seed=seed) for seed in range(3)]
    for one in rows:
        append_row(path, one)
    assert list(read_rows(path)) == rows


def test_an_unfinished_last_line_is_passed_over_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, row(seed=0))
    whole = path.read_bytes()
    path.write_bytes(whole + row(seed=1).to_line().encode()[:-1])
    assert [found.seed for found in read_rows(path)] == [0]
    drop_unfinished_line(path)
    assert path.read_bytes() == whole
    append_row(path, row(seed=2))
    assert [found.seed for found in read_rows(path)] == [0, 2]


def test_a_file_of_nothing_but_an_unfinished_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    drop_unfinished_line(path)  # there is none yet
    assert not path.exists()
    path.write_text('{"id": "ab', encoding="utf-8")
    drop_unfinished_line(path)
    assert path.read_bytes() == b""
    assert list(read_rows(path)) == []


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_devices_and_pipes_are_not_opened(target: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "rows.jsonl"
    path.symlink_to(target)
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", "3", "{}", "[" * 100_000, json.dumps({"id": "x", "colour": "red"})],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, row())
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"Line 2 of .*rows\.jsonl"):
        list(read_rows(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.jsonl cannot be read"):
        list(read_rows(tmp_path / "absent.jsonl"))
