"""Run cells in parallel processes that never outlive their parent; repeat no finished run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.evidence.corpus import Corpus, build_corpus
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.rate_search import next_cells
from hf_pss.evidence.rows import Row, append_row, drop_unfinished_line, read_rows
from hf_pss.runs.signals import signals_interrupt

ROWS_FILE = "rows.jsonl"
LOG_FILE = "train.log"
_POLL_SECONDS = 0.2
_PARENT_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0


def run_sweep(
    cells: Sequence[Cell],
    output_dir: Path,
    *,
    num_processes: int | None = None,
    console: Console | None = None,
) -> str:
    """Run the cells that have no row yet, and append one row per run to ``rows.jsonl``.

    Args:
        cells: The grid; see `hf_pss.evidence.grid.read_grid`.
        output_dir: The sweep's folder, which is created if it is missing. Rows of an earlier sweep
            in it count as done, even if that sweep was killed. Failed runs are tried again.
        num_processes: Number of runs at the same time, each on one thread. None means one per core.
        console: Where progress is shown.

    Returns:
        ``finished``, ``failed`` (a run ended with an error, which its row holds) or
        ``interrupted``.

    Raises:
        ConfigurationError: A cell cannot be run, the folder cannot be written to, or another sweep
            is writing to it.
        PSSError: A worker was killed from outside.
    """
    for cell in cells:
        cell.check()
    console = console or Console(stderr=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The sweep cannot write to {output_dir}: {error}.") from error
    try:
        with FileLock(output_dir / ".lock").acquire(timeout=0):
            return _run_missing(cells, output_dir / ROWS_FILE, num_processes, console)
    except Timeout as error:
        raise ConfigurationError(
            f"Another sweep is writing to {output_dir}; wait for it, or give another --output-dir."
        ) from error


def _run_missing(
    cells: Sequence[Cell], path: Path, num_processes: int | None, console: Console
) -> str:
    drop_unfinished_line(path)
    rows = {r.id: r for r in read_rows(path) if r.status != "failed"} if path.exists() else {}
    started: set[str] = set()  # a failed run is retried by the next sweep, not by this one

    def more() -> list[Cell]:
        found = [cell for cell in next_cells(cells, rows) if cell.id not in started]
        started.update(cell.id for cell in found)
        return found

    if rows:
        console.print(f"{len(rows)} runs are already finished.")
    todo = more()
    if not todo:
        return "finished"
    prepare_corpora(cells, console)
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(todo))

        def take(cell: Cell, row: Row) -> None:
            append_row(path, row)
            if row.status != "failed":
                rows[row.id] = row
            progress.advance(task)
            progress.console.print(f"{cell}: {_outcome(row)}", highlight=False)

        def take_more() -> list[Cell]:
            found = more()
            progress.update(task, total=len(started))
            return found

        processes = num_processes or num_cores()
        return run_cells(todo, take, more=take_more, num_processes=processes)


def _outcome(row: Row) -> str:
    if row.status != "finished":
        return f"{row.status}: {row.error}"
    loss = "not finite" if row.final_eval_loss is None else f"{row.final_eval_loss:.3f}"
    exploded = f", {row.explosion_kind} at step {row.explosion_step}" if row.explosion_kind else ""
    return f"{loss} ({row.train_seconds:.0f} s{exploded})"


def run_cells(
    cells: Sequence[Cell],
    take: Callable[[Cell, Row], None],
    *,
    num_processes: int,
    more: Callable[[], Iterable[Cell]] = tuple,
    folder_of: Callable[[Cell], Path] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> str:
    """Train cells in parallel processes, and pass on the row of each run when it ends.

    Args:
        cells: What to train.
        take: Receives a cell and its row. The row of a run that raised has the status ``failed``.
        num_processes: Number of runs at the same time, each on one thread.
        more: Returns further cells to train. It is called after every run.
        folder_of: Returns the folder for the files and the log of a run. With None a run keeps no
            files.
        poll: A function that is called several times per second.

    Returns:
        ``finished``, ``failed`` (some run ended with an error) or ``interrupted``.

    Raises:
        ConfigurationError: A cell cannot be run.
        PSSError: A worker was killed from outside.
    """
    is_failed = False
    pending: dict[Future[Row], Cell] = {}
    with signals_interrupt(), _pool(num_processes, is_silent=folder_of is None) as pool:

        def submit(cells: Iterable[Cell]) -> None:
            for cell in cells:
                folder = folder_of(cell) if folder_of else None
                pending[pool.submit(_run, cell, folder)] = cell

        try:
            submit(cells)
            while pending:
                done, _ = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = pending.pop(future)
                    row = future.result()
                    is_failed |= row.status == "failed"
                    take(cell, row)
                    submit(more())
                poll()
        except KeyboardInterrupt:
            return "interrupted"
        except BrokenProcessPool as error:
            raise PSSError(
                "Something outside killed a run's process, perhaps because memory was short. "
                "Finished runs are kept. Run the same command with fewer --processes to continue."
            ) from error
    return "failed" if is_failed else "finished"


@contextmanager
def _pool(size: int, *, is_silent: bool) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool, and end all of its processes when the block ends, for whatever reason."""
    pool = ProcessPoolExecutor(
        size,
        mp_context=get_context("spawn"),
        initializer=_start,
        initargs=(os.getpid(), is_silent),
    )
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def _start(parent: int, is_silent: bool) -> None:
    """Prepare a worker process."""
    _end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    import torch

    torch.set_num_threads(1)  # the matrices are too small for more threads
    if is_silent:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    else:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


def _end_with_parent(parent: int) -> None:
    """End this process soon after its parent has ended."""

    def poll_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=poll_parent, daemon=True).start()


def _run(cell: Cell, folder: Path | None) -> Row:
    from hf_pss.evidence.worker import run_cell, train_cell

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("wb") as log:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(log.fileno(), stream.fileno())
    try:
        return run_cell(cell) if folder is None else train_cell(cell, folder)
    except ConfigurationError:
        raise
    except Exception as error:  # an error in one run must not end the others
        if folder is not None:
            traceback.print_exc()
        return cell.new_row(status="failed", error=f"{type(error).__name__}: {error}")


def prepare_corpora(cells: Sequence[Cell], console: Console) -> list[Corpus]:
    """Fill the corpus cache once, before several processes need it."""
    wanted = sorted(
        {
            (cell.recipe.corpus, cell.recipe.vocab_size, cell.recipe.context_length)
            for cell in cells
            if cell.recipe.corpus != "digits"
        }
    )
    return [
        build_corpus(
            name,
            vocab_size=vocab_size,
            context_length=context_length,
            max_tokens=None,
            progress=lambda text: console.print(f"Preparing the corpus: {text} …"),
        )
        for name, vocab_size, context_length in wanted
    ]


def num_cores() -> int:
    """Count the cores that this process may use, or all if the system does not report that."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
