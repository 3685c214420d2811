"""Write the report: one self-contained page, and its figures as PNG files beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from hf_pss.errors import ConfigurationError
from hf_pss.evidence import report_records, report_results
from hf_pss.evidence.report_records import (
    RunDirectory,
    answer_of,
    event_of,
    label,
    load_run_directory,
    number,
)
from hf_pss.evidence.rows import Floats, over_finite, rolling
from hf_pss.records.events import Intervention, Record
from hf_pss.records.strict_json import visible
from hf_pss.runs.folder import leads_out, write_whole
from hf_pss.view.canvas import (
    Axes,
    Figure,
    Line2D,
    colour,
    inline_svg,
    mark_level,
    new_figure,
    render_template,
    style,
    to_png,
    use_log_scale,
)
from hf_pss.view.heat_map import OUTSIDE_BLOCKS, HeatMapPanel, heat_map_figure, row_of
from hf_pss.view.numbers import plural, significant

# A window of 1/40 of the run removes the noise of single batches and keeps a spike of ten
# steps visible.
_SMOOTHING_FRACTION = 1 / 40
_MOST_SMOOTHED_STEPS = 200  # the time grows with the window
# A loss far above the first one only shows that the run is lost, so the axis ends here.
_LOSS_HEADROOM = 1.15
# The axis of the norms ends four decades from their median. Otherwise one explosion would
# flatten the rest.
_GRADIENT_HEADROOM = 1e4
# A logarithmic axis can show neither zero nor a number that is zero in float32.
_SMALLEST_NORM = float(np.finfo(np.float32).tiny)
_DASHES = (0, (3, 2))


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.png``.

    Args:
        run_dir: A run directory. The run may be interrupted or still running.
        out: The page to write. None means ``run_dir/report.html``.

    Returns:
        The page's path. It needs no other file and no network.

    Raises:
        ConfigurationError: `run_dir` holds no run, the page's folder is a link in the run that
            leads out of it, or the folder for the figures is a link or leads out of the page's
            folder.
        OSError: A file cannot be written.
    """
    directory = load_run_directory(run_dir)
    page = run_dir / "report.html" if out is None else out
    pictures = page.parent / "figures"
    # Whoever made the run could have put a link there.
    is_inside = Path(os.path.abspath(page)).is_relative_to(os.path.abspath(run_dir))
    if is_inside and leads_out(page.parent, run_dir):
        raise ConfigurationError(
            f"{visible(page.parent)} is a link that leads out of the run. Remove the link, or give "
            "another --output."
        )
    # A link could lead to files of the run, and the figures would overwrite them.
    if pictures.is_symlink() or leads_out(pictures, page.parent):
        raise ConfigurationError(
            f"{visible(pictures)} is a link. The figures would overwrite what it leads to. Remove "
            "the link, or give another --output."
        )
    with style():
        figures = {
            "loss": loss_figure(directory),
            "gradient_norm": gradient_figure(directory),
            "stable_rank": stable_rank_figure(directory),
        }
        pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure is not None:
                write_whole(pictures / f"{name}.png", to_png(figure))
        images = inline_svg(figures)
    names = {name for run in directory.runs for name in run.stable_ranks.names}
    values = {
        "directory": directory,
        "records": report_records,
        "results": report_results,
        "figures": images,
        "roles": sorted({row_of(name).role for name in names}),
        "noise": noise_levels(directory),
        "methods": [(label(guard), _method(directory, guard)) for guard in directory.guards],
        "groups_of": _groups,
        "short_name": _short_name,
        "colour_of": colour_of,
    }
    write_whole(page, render_template("hf_pss.evidence", "template.html.j2", values))
    return page


def _short_name(name: str) -> str:
    row = row_of(name)
    return row.role if row.block == OUTSIDE_BLOCKS else f"block {row.block} {row.role}"


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Return each intervention by itself, and neighbouring events that are alike together."""

    def likeness(numbered: tuple[int, Record]) -> tuple[object, ...]:
        index, record = numbered
        alone = index if isinstance(record, Intervention) else None
        event = event_of(record)
        return alone, event.kind, event.detector, answer_of(record)

    return [[record for _, record in group] for _, group in groupby(enumerate(records), likeness)]


def _method(directory: RunDirectory, guard: str) -> str:
    """Describe from the files of a guard what it did: detector, threshold, smoothing."""
    records = [record for run in directory.of(guard) for record in run.interventions]
    if not records:
        return "did not change a single weight."
    kinds = sorted({(record.event.detector, record.smoothing) for record in records})
    named = "; ".join(f"detector {detector}, smoothing {phi}" for detector, phi in kinds)
    thresholds = [number(record.event.threshold) for record in records]
    thresholds = [threshold for threshold in thresholds if math.isfinite(threshold)]
    if thresholds:
        low, high = significant(min(thresholds)), significant(max(thresholds))
        named += f"; threshold {low}" if low == high else f"; thresholds between {low} and {high}"
    return f"{named}."


def colour_of(directory: RunDirectory, guard: str) -> str:
    """Return the colour of a guard in all figures."""
    return colour(guard, directory.guards, directory.reference)


def loss_figure(directory: RunDirectory) -> Figure:
    """Draw the validation loss beside the training loss, for all guards and seeds."""
    figure = new_figure(10, 3.9)
    validation, training = figure.subplots(1, 2)
    for run in directory.runs:
        tint, loss = colour_of(directory, run.guard), run.loss
        window = min(max(1, round(len(loss) * _SMOOTHING_FRACTION)), _MOST_SMOOTHED_STEPS)
        validation.plot(run.eval_loss.steps, run.eval_loss.values, color=tint, marker="o", ms=2.5)
        training.plot(loss.steps, loss.values, color=tint, alpha=0.15, lw=0.7)
        training.plot(loss.steps, moving_average(loss.values, window), color=tint)
    for axes, title in ((validation, "Validation loss"), (training, "Training loss")):
        _finish(axes, title)
        _cut_above(axes, _loss_limit(directory))
        low, high = axes.get_ylim()
        if low < directory.unigram_entropy_nats < high:
            mark_level(axes, directory.unigram_entropy_nats, "unigram entropy")
    for run in directory.runs:
        steps = run.loss.steps[np.isnan(run.loss.values)]
        _mark(training, steps, "x", height=0.985, ms=4, color=colour_of(directory, run.guard))
    _legend(figure, directory)
    return figure


def gradient_figure(directory: RunDirectory) -> Figure:
    """Draw the gradient norm, baseline and threshold of each guard's first seed."""
    figure = new_figure(10, 3.4)
    runs = [directory.of(guard)[0] for guard in directory.guards]
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        norm, baseline, threshold = run.grad_norm_preclip, run.baseline, run.threshold
        axes.plot(norm.steps, norm.values, color=colour_of(directory, run.guard), lw=0.8)
        axes.plot(baseline.steps, baseline.values, color="black", lw=0.9)
        axes.plot(threshold.steps, threshold.values, color="black", lw=0.9, ls=_DASHES)
        steps = [intervention.event.step for intervention in run.interventions]
        _mark(axes, steps, "v", height=0.96, ms=3, color="black")
        _finish(axes, run.title)
    _scale_norms(panels[0], np.concatenate([run.grad_norm_preclip.finite for run in runs]))
    panels[0].set_ylabel("norm before clipping")
    handles = [
        Line2D([], [], color="black", lw=0.9, label="baseline"),
        Line2D([], [], color="black", lw=0.9, ls=_DASHES, label="threshold"),
        Line2D([], [], color="black", lw=0, marker="v", ms=3, label="intervention"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def stable_rank_figure(directory: RunDirectory) -> Figure | None:
    """Draw the stable ranks of each guard's first seed; None if no run has recorded one."""
    runs = [directory.of(guard)[0] for guard in directory.guards]
    panels = [
        HeatMapPanel(run.title, ranks.steps, ranks.names, ranks.values)
        for run in runs
        for ranks in (run.stable_ranks,)
    ]
    return heat_map_figure(panels, noise=noise_levels(directory))


def headline_plot(run_dir: Path, out_png: Path) -> None:
    """Draw all runs in one wide figure: the loss on the left, the stable rank on the right.

    Args:
        run_dir: A run directory.
        out_png: The file to write.

    Raises:
        ConfigurationError: `run_dir` holds no run.
    """
    directory = load_run_directory(run_dir)
    with style():
        figure = new_figure(11, 3.8)
        left, right = figure.subplots(1, 2)
        for run in directory.runs:
            tint, ranks = colour_of(directory, run.guard), run.stable_ranks
            left.plot(run.eval_loss.steps, run.eval_loss.values, color=tint, lw=2)
            right.plot(ranks.steps, over_finite(ranks.values.T, np.nanmean), color=tint, lw=2)
        _finish(left, f"Validation loss, {plural(len(directory.seeds), 'seed')}")
        _cut_above(left, _loss_limit(directory))
        _finish(right, "Stable rank, mean over all selected matrices")
        right.set_ylim(bottom=0)
        _legend(figure, directory)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out_png, to_png(figure))


def moving_average(values: Floats, window: int) -> Floats:
    """Return the centred mean over the finite values in a window; NaN if it holds none.

    >>> moving_average(np.array([1.0, np.nan, 3.0]), 3).tolist()
    [1.0, 2.0, 3.0]
    """
    half = min(window, len(values)) // 2
    return rolling(values, np.nanmean, before=half, after=half)


def noise_levels(directory: RunDirectory) -> dict[str, float]:
    """Return the stable rank of i.i.d. noise, mn/(√m + √n)², for each shape in the events."""
    shapes = {
        tuple(sorted(matrix.shape))
        for run in directory.runs
        for intervention in run.interventions
        for matrix in intervention.matrices
        if len(matrix.shape) == 2 and min(matrix.shape) > 0
    }
    return {f"{m}×{n}": m * n / (m**0.5 + n**0.5) ** 2 for m, n in sorted(shapes)}


def _scale_norms(axes: Axes, norms: Floats) -> None:
    """Make a shared axis logarithmic, with room at the top for the marks of interventions."""
    norms = norms[norms > _SMALLEST_NORM]
    if not len(norms):
        return
    low, high, median = norms.min(), norms.max(), np.median(norms)
    top = 4 * min(high, median * _GRADIENT_HEADROOM)
    # The limits come first, because matplotlib warns about its default limits on a
    # logarithmic axis.
    axes.set_ylim(max(low / 1.5, median / _GRADIENT_HEADROOM), top)
    use_log_scale(axes)
    if high > top:
        _note(axes, f"cut off; the largest is {high:.3g}", height=0.86)


def _loss_limit(directory: RunDirectory) -> float:
    known = [run.loss.finite[0] for run in directory.runs if len(run.loss.finite)]
    if not math.isnan(directory.unigram_entropy_nats):
        known.append(directory.unigram_entropy_nats)
    return _LOSS_HEADROOM * max(known, default=math.inf)


def _cut_above(axes: Axes, limit: float) -> None:
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if len(values) and values.max() > limit:
        low = min(values.min(), limit)
        axes.set_ylim(low - 0.05 * (limit - low), limit)
        _note(axes, f"cut off; the highest is {values.max():.3g}", height=0.02)


def _mark(
    axes: Axes, steps: Sequence[float] | Floats, marker: str, *, height: float, **look: Any
) -> None:
    heights = [height] * len(steps)
    axes.plot(steps, heights, marker, transform=axes.get_xaxis_transform(), **look)


def _legend(figure: Figure, directory: RunDirectory) -> None:
    handles = [
        Line2D([], [], color=colour_of(directory, guard), lw=2, label=label(guard))
        for guard in directory.guards
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.margins(x=0.02)


def _note(axes: Axes, text: str, *, height: float) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    place = axes.transAxes
    axes.text(0.02, height, text, transform=place, fontsize=7.5, color="#777777", bbox=box)
