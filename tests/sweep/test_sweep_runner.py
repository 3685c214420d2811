"""Sweeps: parallel, resumable after any end, and without orphans."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from preloaded import children_of, is_running, start, wait_until
from rich.console import Console
from small_library import small_library, use_small_library
from sweep_cells import GRID, cell, ids, rows_in

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.grid import Cell, read_grid
from hf_pss.evidence.rows import append_row
from hf_pss.evidence.runner import ROWS_FILE, run_sweep
from hf_pss.evidence.worker import run_cell

PROGRAM = Path(__file__).with_name("sweep_process.py")


@pytest.fixture(autouse=True)
def _corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_library(monkeypatch)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID, encoding="utf-8")
    return path


def quiet() -> Console:
    return Console(quiet=True)


def test_a_grid_is_run_once(tmp_path: Path, grid: Path) -> None:
    """Four cells on two processes; the same rows as in one process; then nothing is left to do."""
    cells = read_grid(grid)
    with start(PROGRAM, grid, tmp_path / "out", small_library()) as sweep:
        told, errors = sweep.communicate()
    assert told == "finished", errors
    rows = rows_in(tmp_path / "out")
    assert ids(rows) == sorted(c.id for c in cells)
    assert all(row.status == "finished" for row in rows)
    by_id = {row.id: row for row in rows}
    assert run_cell(cells[0]).losses == by_id[cells[0].id].losses
    before = (tmp_path / "out" / ROWS_FILE).read_bytes()
    assert run_sweep(cells, tmp_path / "out", console=quiet()) == "finished"
    assert (tmp_path / "out" / ROWS_FILE).read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_sweep_goes_on_and_leaves_no_orphan(tmp_path: Path, grid: Path) -> None:
    path, held = tmp_path / "out" / ROWS_FILE, tmp_path / "held"
    held.touch()
    with start(PROGRAM, grid, path.parent, small_library(), held) as process:
        wait_until(lambda: path.exists() and b"\n" in path.read_bytes(), "no row came")
        assert process.poll() is None, process.errors
        workers = children_of(process.pid)
        assert workers
        process.kill()
        process.wait()
        done = path.read_bytes()
        finished = rows_in(path.parent)
        assert 1 <= len(finished) <= 2
        wait_until(lambda: not any(map(is_running, workers)), "a worker outlived its sweep")
    held.unlink()
    path.write_bytes(done + b'{"id": "half a li')
    with start(PROGRAM, grid, path.parent, small_library()) as again:
        told, errors = again.communicate()
    assert told == "finished", errors
    assert path.read_bytes().startswith(done)
    rows = rows_in(path.parent)
    assert ids(rows) == sorted(c.id for c in read_grid(grid))  # four, none twice
    assert rows[: len(finished)] == finished


def test_what_failed_is_tried_again(tmp_path: Path, grid: Path) -> None:
    grid.write_text(GRID.replace("seeds: 2", "seeds: 1").replace("none, clip", "none"))
    (one,) = read_grid(grid)
    finished = run_cell(one)
    (tmp_path / "out").mkdir()
    failed = replace(finished, status="failed", error="RuntimeError: x")
    append_row(tmp_path / "out" / ROWS_FILE, failed)
    with start(PROGRAM, grid, tmp_path / "out", small_library()) as sweep:
        told, errors = sweep.communicate()
    assert told == "finished", errors
    rows = rows_in(tmp_path / "out")
    assert [row.status for row in rows] == ["failed", "finished"]
    assert rows[1].losses == finished.losses


def test_a_mistake_in_a_cell_ends_the_sweep_with_its_message(tmp_path: Path) -> None:
    cells: list[Cell] = [cell("stable_adamw", optimizer="sgd")]
    with pytest.raises(ConfigurationError, match="in AdamW's place"):
        run_sweep(cells, tmp_path, num_processes=1, console=quiet())
