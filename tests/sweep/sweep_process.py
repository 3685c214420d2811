"""A sweep in a process of its own: ``sweep_process.py GRID OUT LIBRARY [HELD]``.

Its runs' processes are forks, which import nothing anew, and read the small library. While there
is a file HELD, runs of a seed above 0 wait before they begin.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from multiprocessing import get_context
from pathlib import Path

from hf_pss.evidence import runner, worker
from hf_pss.evidence.grid import Cell, read_grid
from hf_pss.evidence.rows import Row

run_at_once = worker.run_cell


def hold(file: Path) -> None:
    def run_later(cell: Cell) -> Row:
        while cell.seed > 0 and file.exists():
            time.sleep(0.02)
        return run_at_once(cell)

    worker.run_cell = run_later


def main(grid: Path, out: Path, library: str, *held: str) -> None:
    paths = {**sysconfig.get_paths(), "stdlib": library}
    sysconfig.get_paths = lambda: paths  # type: ignore[assignment]
    runner.get_context = lambda _: get_context("fork")  # type: ignore[assignment]
    for name in held:
        hold(Path(name))
    status = runner.run_sweep(read_grid(grid), out, num_processes=2)
    sys.stdout.write(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
