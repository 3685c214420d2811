"""The result of a demo run as a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from hf_pss.report import text
from hf_pss.report.load import load_run_directory
from hf_pss.report.records import RunDirectory
from hf_pss.report.results import Result, mean_result, outcome, result

__all__ = ["render_table"]

_NUMBERS = (
    "validation\nloss",
    "training\nloss",
    "inter-\nventions",
    "NaN\nor inf",
    "overhead",
    "time",
)


def render_table(run_dir: Path) -> Table:
    """Put losses, events and overhead of every guard side by side, averaged over its seeds.

    Args:
        run_dir: a run directory, also of an interrupted run.

    Raises:
        ConfigurationError: `run_dir` holds no run.
    """
    directory = load_run_directory(run_dir)
    # Lean enough for a terminal of 80 columns.
    table = Table(
        title=_title(directory),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("guard", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    for guard in directory.guards:
        mean = mean_result([result(run) for run in directory.of(guard)])
        # `Text`, because a name in square brackets would be taken for rich's markup.
        table.add_row(Text(guard), *_cells(mean))
    return table


def _title(directory: RunDirectory) -> str:
    seeds = len(directory.seeds)
    mean = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
    state = "" if directory.status == "finished" else ", not finished"
    return f"Twin runs, {mean}{state}"


def _cells(line: Result) -> tuple[str, ...]:
    return (
        outcome(line),
        text.fixed(line.final_train_loss),
        text.count(line.num_interventions),
        text.count(line.num_nonfinite_steps),
        text.percent(line.overhead_ratio),
        text.duration(line.train_seconds),
    )
