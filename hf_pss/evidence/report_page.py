"""Write the report: one self-contained page, and its figures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from hf_pss.evidence.report_plots import (
    colour_of,
    gradient_figure,
    loss_figure,
    noise_levels,
    stable_rank_figure,
)
from hf_pss.evidence.report_records import (
    ReportEvent,
    RunDirectory,
    TrainingRun,
    load_run_directory,
)
from hf_pss.evidence.report_results import Result, headline, label, mean_result, outcome, result
from hf_pss.runs.folder import write_whole
from hf_pss.view import canvas
from hf_pss.view.heat_map import OUTSIDE_BLOCKS, row_of
from hf_pss.view.numbers import significant
from hf_pss.view.page import inline_svg, render_template

__all__ = ["write_report"]

# A floor may act at every check. The page shows the first events, and the file of the run has all.
_MOST_LINES = 40
_MOST_DETAILED = 10


@dataclass(frozen=True, slots=True)
class SummaryLine:
    """A line of the summary table: one seed of a guard, or the mean over its seeds."""

    guard: str
    colour: str
    seed: str
    result: Result
    is_mean: bool


@dataclass(frozen=True, slots=True)
class EventLine:
    """A line of the table of events: one intervention, or several similar events in a row."""

    first: ReportEvent
    last_step: int
    num_events: int


@dataclass(frozen=True, slots=True)
class EventList:
    """The events of one run that the page shows."""

    title: str
    path: str
    shown: tuple[EventLine, ...]
    detailed: tuple[ReportEvent, ...]
    num_lines: int
    num_interventions: int
    num_others: int


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.png``.

    Args:
        run_dir: A run directory. The run may be interrupted or still running.
        out: The page to write, or a folder for it. None means ``run_dir/report.html``.

    Returns:
        The page's path. It needs no other file and no network.

    Raises:
        ConfigurationError: `run_dir` holds no run.
    """
    directory = load_run_directory(run_dir)
    page = run_dir / "report.html" if out is None else out
    if page.is_dir():
        page = page / "report.html"
    with canvas.style():
        figures = {
            "loss": loss_figure(directory),
            "gradient_norm": gradient_figure(directory),
            "stable_rank": stable_rank_figure(directory),
        }
        for name, figure in figures.items():
            if figure is not None:
                canvas.save_png(figure, page.parent / "figures" / f"{name}.png")
        values = {
            "directory": directory,
            "sentences": headline(directory),
            "lines": list(_summary_lines(directory)),
            "figures": inline_svg(figures),
            "noise": noise_levels(directory),
            "roles": _roles(directory),
            "events": [_event_list(run) for run in directory.runs if run.events],
            "methods": [(label(guard), _method(directory, guard)) for guard in directory.guards],
            "label": label,
            "outcome": outcome,
            "short_name": _short_name,
        }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, render_template("hf_pss.evidence", "template.html.j2", values))
    return page


def _summary_lines(directory: RunDirectory) -> Iterator[SummaryLine]:
    for guard in directory.guards:
        runs, colour = directory.of(guard), colour_of(directory, guard)
        results = [result(run) for run in runs]
        for run, one in zip(runs, results, strict=True):
            yield SummaryLine(label(guard), colour, str(run.seed), one, is_mean=False)
        if len(runs) > 1:
            yield SummaryLine(label(guard), colour, "mean", mean_result(results), is_mean=True)


def _short_name(name: str) -> str:
    row = row_of(name)
    return row.role if row.block == OUTSIDE_BLOCKS else f"block {row.block} {row.role}"


def _roles(directory: RunDirectory) -> list[str]:
    names = [name for run in directory.runs for name in run.stable_ranks.names]
    return sorted({row_of(name).role for name in names})


def _event_list(run: TrainingRun) -> EventList:
    event_lines = tuple(_event_lines(run.events))
    return EventList(
        title=f"{label(run.guard)}, seed {run.seed}",
        path=f"{run.guard}/seed-{run.seed}/pss_events.jsonl",
        shown=event_lines[:_MOST_LINES],
        detailed=run.interventions[:_MOST_DETAILED],
        num_lines=len(event_lines),
        num_interventions=len(run.interventions),
        num_others=len(run.events) - len(run.interventions),
    )


def _event_lines(events: Sequence[ReportEvent]) -> Iterator[EventLine]:
    """Yield one line per intervention, and one for neighbouring events that changed nothing."""

    def likeness(numbered: tuple[int, ReportEvent]) -> tuple[object, ...]:
        index, event = numbered
        alone = index if event.is_intervention else None
        return alone, event.kind, event.detector, event.answer

    for _, group in groupby(enumerate(events), key=likeness):
        alike = [event for _, event in group]
        yield EventLine(alike[0], alike[-1].step, len(alike))


def _method(directory: RunDirectory, guard: str) -> str:
    """Describe from the files of a guard what it did: detector, threshold, smoothing."""
    events = [event for run in directory.of(guard) for event in run.interventions]
    if not events:
        return "did not change a single weight."
    kinds = sorted({(event.detector, event.smoothing) for event in events})
    named = "; ".join(f"detector {detector}, smoothing {phi}" for detector, phi in kinds)
    thresholds = [event.threshold for event in events if np.isfinite(event.threshold)]
    if thresholds:
        low, high = significant(min(thresholds)), significant(max(thresholds))
        named += f"; threshold {low}" if low == high else f"; thresholds between {low} and {high}"
    return f"{named}."
