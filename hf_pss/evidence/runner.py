"""Run the cells of a grid in parallel processes; what is finished is never done again."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.processes import end_with_parent, num_cores, signals_interrupt
from hf_pss.evidence.rows import Row, append_row, drop_unfinished_line, read_rows

__all__ = ["ROWS_FILE", "run_sweep"]

ROWS_FILE = "rows.jsonl"


def run_sweep(
    cells: Sequence[Cell],
    output_dir: Path,
    *,
    num_processes: int | None = None,
    console: Console | None = None,
) -> str:
    """Run what is not finished yet, and append one row a run to ``rows.jsonl``.

    Args:
        cells: The grid; see `hf_pss.evidence.grid.read_grid`.
        output_dir: Made if need be. Rows of an earlier, killed sweep in it count as done; failed
            runs are tried again.
        num_processes: Runs at the same time, each on one thread; one a core when None.
        console: Where progress is shown.

    Returns:
        ``finished``, ``failed`` (some run ended with an error; its row says which) or
        ``interrupted``.

    Raises:
        ConfigurationError: A cell cannot be run, the folder cannot be written to, another sweep is
            writing to it, or a count is not positive.
        PSSError: A worker was killed from outside.
    """
    if num_processes is not None and num_processes < 1:
        raise ConfigurationError("The number of processes must be 1 or more.")
    for cell in cells:
        cell.check()
    console = console or Console(stderr=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The sweep cannot write to {output_dir}: {error}.") from error
    lock = FileLock(output_dir / ".lock")
    try:
        with lock.acquire(timeout=0):
            return _run_all(cells, output_dir / ROWS_FILE, num_processes, console)
    except Timeout as error:
        raise ConfigurationError(
            f"Another sweep is writing to {output_dir}; wait for it, or give another --output-dir."
        ) from error


def _run_all(cells: Sequence[Cell], path: Path, num_processes: int | None, console: Console) -> str:
    drop_unfinished_line(path)
    done = {row.id for row in read_rows(path) if row.status != "failed"} if path.exists() else set()
    todo = [cell for cell in cells if cell.id not in done]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} runs are there already.")
    if not todo:
        return "finished"
    _prepare_corpora(todo, console)
    at_a_time = min(num_processes or num_cores(), len(todo))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    num_failed = 0
    with Progress(*columns, console=console) as progress, signals_interrupt():
        task = progress.add_task("runs", total=len(todo))
        with _pool(at_a_time) as pool:
            futures: dict[Future[Row], Cell] = {pool.submit(_run, cell): cell for cell in todo}
            try:
                for future in as_completed(futures):
                    row = _row(future, futures[future])
                    append_row(path, row)
                    num_failed += row.status == "failed"
                    progress.advance(task)
                    progress.console.print(_told(futures[future], row), highlight=False)
            except KeyboardInterrupt:
                return "interrupted"
            except BrokenProcessPool as error:
                raise PSSError(
                    "A run's process was killed from outside, perhaps for its memory. What has "
                    "finished is kept; the same command, with fewer --processes, goes on."
                ) from error
    return "failed" if num_failed else "finished"


def _row(future: Future[Row], cell: Cell) -> Row:
    """Return the run's row; an error in one run must not end the others."""
    try:
        return future.result()
    except (ConfigurationError, BrokenProcessPool):
        raise
    except Exception as error:
        return cell.new_row(status="failed", error=f"{type(error).__name__}: {error}")


@contextmanager
def _pool(size: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that is ended at once, with what runs in it, however the block is left."""
    pool = ProcessPoolExecutor(
        size, mp_context=get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
    )
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _start(parent: int) -> None:
    """Prepare a worker: one thread, for its matrices are too small to share; no word of its own."""
    import signal

    import torch

    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which ends its runs
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _run(cell: Cell) -> Row:
    from hf_pss.evidence.sweep_worker import run_cell

    return run_cell(cell)


def _prepare_corpora(cells: Sequence[Cell], console: Console) -> None:
    """Fill the corpus cache once, before several processes want it."""
    from hf_pss.evidence.corpus import build_corpus

    kinds = {
        (cell.recipe.training.vocab_size, cell.recipe.training.context_length) for cell in cells
    }
    for vocab_size, context_length in sorted(kinds):
        build_corpus(
            vocab_size=vocab_size,
            context_length=context_length,
            max_tokens=None,
            progress=lambda text: console.print(f"Preparing the corpus: {text} …"),
        )


def _told(cell: Cell, row: Row) -> str:
    if row.status != "finished":
        return f"{cell}: {row.status}: {row.error}"
    loss = "not finite" if row.final_eval_loss is None else f"{row.final_eval_loss:.3f}"
    exploded = f", {row.explosion_kind} at step {row.explosion_step}" if row.explosion_kind else ""
    return f"{cell}: {loss} ({row.train_seconds:.0f} s{exploded})"
