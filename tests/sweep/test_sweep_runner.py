"""Sweeps: parallel, resumable after any end, and without orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sweep_cells import GRID, cell, corpus_cache, ids, rows_in

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.grid import Cell, read_grid
from hf_pss.evidence.rows import append_row
from hf_pss.evidence.runner import ROWS_FILE, run_sweep
from hf_pss.evidence.worker import run_cell

PATIENCE_SECONDS = 60.0
SWEEP = """
import sys
from pathlib import Path
from hf_pss.evidence.grid import read_grid
from hf_pss.evidence.runner import run_sweep
if __name__ == "__main__":
    print(run_sweep(read_grid(Path(sys.argv[1])), Path(sys.argv[2]), num_processes=2))
"""


@pytest.fixture(autouse=True)
def _corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PSS_CACHE", str(corpus_cache()))


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID, encoding="utf-8")
    return path


def quiet() -> Console:
    return Console(quiet=True)


def start(folder: Path, grid: Path) -> subprocess.Popen[str]:
    script = folder / "sweep.py"
    script.write_text(SWEEP, encoding="utf-8")
    words = [sys.executable, str(script), str(grid), str(folder / "out")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_until_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the sweep ended before it was killed"
        assert time.monotonic() < end, "no row came"
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8")
    return [int(word) for word in found.split()]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1]
    except OSError:
        return False
    return state.split()[0] != "Z"


def test_a_grid_is_run_once(tmp_path: Path, grid: Path) -> None:
    """Four cells on two processes; the same rows as in one process; then nothing is left to do."""
    cells = read_grid(grid)
    assert run_sweep(cells, tmp_path / "out", num_processes=2, console=quiet()) == "finished"
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
    grid.write_text(GRID.replace("'num_steps': 4", "'num_steps': 150"), encoding="utf-8")
    path = tmp_path / "out" / ROWS_FILE
    process = start(tmp_path, grid)
    wait_until_rows(path, 1, process)
    workers = children(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = path.read_bytes()
    finished = rows_in(path.parent)
    assert 1 <= len(finished) < 4
    end = time.monotonic() + PATIENCE_SECONDS
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end, "a worker outlived its sweep"
        time.sleep(0.05)
    path.write_bytes(done + b'{"id": "half a li')
    again = start(tmp_path, grid)
    told, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert told.strip() == "finished"
    assert path.read_bytes().startswith(done)
    rows = rows_in(path.parent)
    assert ids(rows) == sorted(c.id for c in read_grid(grid))  # four, none twice
    assert rows[: len(finished)] == finished


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    one = cell()
    finished = run_cell(one)
    append_row(tmp_path / ROWS_FILE, replace(finished, status="failed", error="RuntimeError: x"))
    assert run_sweep([one], tmp_path, num_processes=1, console=quiet()) == "finished"
    rows = rows_in(tmp_path)
    assert [row.status for row in rows] == ["failed", "finished"]
    assert rows[1].losses == finished.losses


def test_a_mistake_in_a_cell_ends_the_sweep_with_its_message(tmp_path: Path) -> None:
    cells: list[Cell] = [cell("stable_adamw", optimizer="sgd")]
    with pytest.raises(ConfigurationError, match="in AdamW's place"):
        run_sweep(cells, tmp_path, num_processes=1, console=quiet())


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_processes_below_one_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigurationError, match="1 or more"):
        run_sweep([cell()], tmp_path, num_processes=count)
