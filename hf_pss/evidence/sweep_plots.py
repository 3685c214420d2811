"""The pictures of a sweep, and those of every live metric of a family of runs with the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hf_pss.evidence.early_warnings import departure_step, record_of
from hf_pss.evidence.rows import (
    Floats,
    PairedDifferences,
    Row,
    Setting,
    best_learning_rate,
    by_setting,
    compare_at_best,
    final_loss,
    losses_by_rate,
    over_finite,
    rolling,
)
from hf_pss.evidence.twin_band import Family, shared_metrics
from hf_pss.runs.folder import write_whole
from hf_pss.view.canvas import (
    colour as colour_of,
)
from hf_pss.view.canvas import (
    mark_level,
    new_figure,
    style,
    to_png,
    to_svg,
    use_log_scale,
)

_SMOOTHED_STEPS = 25

Plot = Callable[[Sequence[Row], Setting, str], Figure]


def plot_all(rows: Sequence[Row], folder: Path, *, reference: str) -> list[Path]:
    """Draw every picture that the rows allow, and return the PNG and SVG files.

    Args:
        rows: Rows of any recipes. Each recipe and optimizer gets separate pictures.
        folder: The folder of the pictures.
        reference: The guard that is drawn in grey and with which the others are compared.
    """
    files: list[Path] = []
    for setting, here in by_setting(rows).items():
        plots: dict[str, Plot] = {"curves": plot_curves}
        if len({row.learning_rate for row in here}) > 1:
            plots["learning-rates"] = plot_learning_rates
        if any(row.guard == reference for row in here) and len({row.guard for row in here}) > 1:
            plots["paired"] = plot_paired
        for name, plot in plots.items():
            with style():
                figure = plot(here, setting, reference)
                stem = folder / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', str(setting))}-{name}"
                write_whole(stem.with_suffix(".png"), to_png(figure))
                write_whole(stem.with_suffix(".svg"), to_svg(figure))
            files += [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    return files


def plot_learning_rates(rows: Sequence[Row], heading: Setting | str, reference: str) -> Figure:
    """Draw the final validation loss against the learning rate: median and range over seeds."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    guards = _guards(rows, reference)
    ends = []
    for guard in guards:
        losses = losses_by_rate(rows, guard)
        rates = list(losses)
        medians = [median(by_seed.values()) for by_seed in losses.values()]
        lows, highs = (
            [pick(by_seed.values()) for by_seed in losses.values()] for pick in (min, max)
        )
        colour = colour_of(guard, guards, reference)
        axes.fill_between(rates, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.plot(rates, medians, color=colour, marker="o", markersize=3.5)
        best = int(np.argmin(medians))
        axes.plot(rates[best], medians[best], color=colour, marker="*", markersize=11)
        ends.append((medians[-1], rates[-1], guard, colour))
    _label_ends(axes, ends)
    mark_level(axes, rows[0].unigram_entropy, "token frequencies alone", at_left=True)
    axes.set_xscale("log")
    tried = sorted({row.learning_rate for row in rows})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final validation loss, nats a token")
    counts = {len(by) for g in guards for by in losses_by_rate(rows, g).values()}
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    axes.set_title(f"{heading}\nmedian of {seeds} seeds, band from best to worst, ★ best rate")
    return figure


def plot_curves(rows: Sequence[Row], setting: Setting, reference: str) -> Figure:
    """Draw the training loss of every run, with one panel per rate and one colour per guard."""
    rates = sorted({row.learning_rate for row in rows})
    shown = rates if len(rates) <= 3 else [rates[0], rates[len(rates) // 2], rates[-1]]
    guards = _guards(rows, reference)
    figure = new_figure(3.6 * len(shown) + 1.6, 3.4)
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, rate in zip(panels, shown, strict=True):
        ends = []
        for guard in guards:
            runs = [row for row in rows if row.guard == guard and row.learning_rate == rate]
            colour = colour_of(guard, guards, reference)
            before = _SMOOTHED_STEPS - 1
            curves = [
                rolling(_floats(row.losses), np.nanmean, before=before, after=0) for row in runs
            ]
            for curve in curves:
                axes.plot(curve, color=colour, linewidth=0.6, alpha=0.35)
            if curves:
                length = min(len(curve) for curve in curves)
                middle = np.median([curve[:length] for curve in curves], axis=0)
                axes.plot(middle, color=colour, linewidth=1.6)
                # A run that ended in NaN gets its name where it was last finite.
                known = middle[np.isfinite(middle)]
                if known.size:
                    ends.append((float(known[-1]), float(length), guard, colour))
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xlabel("step")
        if axes is panels[-1]:
            _label_ends(axes, ends)
    panels[0].set_ylabel(f"training loss, mean of {_SMOOTHED_STEPS} steps")
    figure.suptitle(str(setting), fontsize=10, x=0.01, ha="left")
    return figure


def plot_progress(rows: Sequence[Row], heading: Setting | str, reference: str) -> Figure:
    """Draw the validation loss of each guard at its best rate: every seed, and their median."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    guards = _guards(rows, reference)
    ends = []
    for guard in guards:
        rate = best_learning_rate(rows, guard)
        runs = [row for row in rows if row.guard == guard and row.learning_rate == rate]
        colour = colour_of(guard, guards, reference)
        for row in runs:
            steps, losses = row.eval_steps, _floats(row.eval_losses)
            axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.35)
        longest = max(runs, key=lambda row: len(row.eval_steps))
        whole = [_floats(r.eval_losses) for r in runs if r.eval_steps == longest.eval_steps]
        middle = over_finite(np.array(whole), np.nanmedian)
        axes.plot(longest.eval_steps, middle, color=colour, linewidth=1.6)
        ends += [(middle[-1], longest.eval_steps[-1], f"{guard}, {rate:g}", colour)]
    _label_ends(axes, [end for end in ends if math.isfinite(end[0])])
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title(f"{heading}\neach at its best rate: every seed, and their median")
    return figure


def plot_paired(rows: Sequence[Row], heading: Setting | str, reference: str) -> Figure:
    """Draw guard minus reference, each at its best rate: every seed, mean and 95 % interval."""
    found = _compared(rows, reference)
    found.sort(key=lambda comparison: comparison.mean, reverse=True)
    rate = found[0].learning_rates[1] if found else float("nan")
    labelled = [(f"{c.guard}, {c.learning_rates[0]:g}  [{len(c.differences)}]", c) for c in found]
    figure = _differences(labelled, f"{reference} at {rate:g}")
    figure.axes[0].set_title(
        f"{heading}\neach at its best rate [seeds]; bar: 95 % interval of the mean"
    )
    return figure


def plot_gains(situations: Mapping[str, Sequence[Row]], reference: str) -> Figure:
    """Draw guard minus reference, each at its best rate, in several situations from top to bottom.

    Args:
        situations: The runs of each situation, by its title.
        reference: The guard with which the others are compared.
    """
    labelled: list[tuple[str, PairedDifferences | None]] = []
    for title, rows in situations.items():
        found = _compared(rows, reference)
        labelled += [(title, None), *((f"{c.guard}  [{len(c.differences)}]", c) for c in found)]
    figure = _differences(labelled[::-1], reference)
    figure.suptitle(
        "each at its best rate [seeds]; bar: 95 % interval of the mean",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _compared(rows: Sequence[Row], reference: str) -> list[PairedDifferences]:
    """Return the differences of every guard to the reference, if the reference has runs."""
    guards = _guards(rows, reference)
    others = guards[1:] if guards[0] == reference else []
    return [found for guard in others if (found := compare_at_best(rows, guard, reference))]


def _differences(
    labelled: Sequence[tuple[str, PairedDifferences | None]], reference: str
) -> Figure:
    """Draw one line for each difference, from bottom to top; a label alone is a heading."""
    figure = new_figure(6.4, 1.2 + 0.28 * len(labelled))
    axes = figure.subplots()
    for height, (_, comparison) in enumerate(labelled):
        if comparison is None:
            continue
        colour = "#0072B2" if comparison.mean < 0 else "#D55E00"
        axes.plot(comparison.differences, [height] * len(comparison.differences), "|", color=colour)
        if comparison.interval:
            axes.plot(comparison.interval, [height, height], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(comparison.mean, height, "o", color=colour, markersize=5)
    axes.axvline(0.0, color="#999999", linewidth=1)
    axes.set_yticks(range(len(labelled)), [label for label, _ in labelled])
    axes.set_xlabel(f"validation loss minus that of {reference}, nats")
    return figure


def _guards(rows: Sequence[Row], reference: str) -> list[str]:
    """Return the guards in the order of their best loss, so that labels are near their lines."""
    best = {row.guard: min(final_loss(r) for r in rows if r.guard == row.guard) for row in rows}
    return sorted(best, key=lambda guard: (guard != reference, best[guard]))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name beside the end of its line, so that names do not overlap."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    at = -np.inf
    for value, x, name, colour in sorted(ends):
        at = max(value, at + gap)
        axes.annotate(
            name,
            (x, value),
            xytext=(1.02, at),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


_COLUMNS = 5
_GREY, _BLUE, _RED, _ORANGE = "#777777", "#0072B2", "#D55E00", "#E69F00"
_WIDE = 5.0  # a range beyond this factor is drawn on a logarithmic axis
_METRIC_WINDOW = 9
_DPI = 72  # twenty panels in less than 300 kB


def plot_metrics(families: Sequence[Family], folder: Path) -> list[Path]:
    """Draw each family, and return the PNG files."""
    files = []
    for family in families:
        # A row from a different machine may hold any name, including a path out of the folder.
        path = folder / f"metrics-{re.sub(r'[^A-Za-z0-9_.]+', '-', family.recipe)}.png"
        with style(), mpl.rc_context({"savefig.dpi": _DPI}):
            write_whole(path, to_png(plot_family(family)))
        files.append(path)
    return files


def plot_family(family: Family) -> Figure:
    """Draw one panel per metric: twins blue, exploded runs red, survivors orange, the loss grey.

    A band spans the smallest to the largest series of the metric. A line is the median over
    matrices, or the only series. Both are medians over seeds. The loss is that of the first
    exploded run, or of the first survivor if none exploded. Only the first panel has a scale for
    the loss. A dashed vertical line marks the departure of this loss, and a solid one the
    explosion. Without an explosion, one line marks the first step of the fault.
    """
    shown = (family.exploded or family.survivors)[0]
    metrics = shared_metrics((*family.twins, shown))
    groups = (
        ("twins (blue)", _BLUE, family.twins),
        ("neither (orange)", _ORANGE, family.survivors),
        ("exploded (red)", _RED, family.exploded),
    )
    num_rows = -(-len(metrics) // _COLUMNS)
    figure = new_figure(2.5 * _COLUMNS, 1.65 * num_rows + 0.5)
    panels = list(figure.subplots(num_rows, _COLUMNS, sharex=True, squeeze=False).flat)
    for axes, (metric, series) in zip(panels, metrics.items(), strict=False):
        if metric != "loss":
            _draw_loss(axes, shown)
        drawn = [_draw(axes, rows, series, hue) for _, hue, rows in groups]
        _scale(axes, min(low for low, _ in drawn), max(high for _, high in drawn))
        _mark(axes, shown)
        axes.set_title(metric, fontsize=8.5)
        axes.tick_params(labelsize=7)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    parts = [] if family.twins else ["no healthy twin"]
    for name, _, rows in groups:
        rates = ", ".join(f"{rate:g}" for rate in sorted({row.learning_rate for row in rows}))
        parts += [f"{len(rows)} {name} at {rates}"] if rows else []
    title = f"{family.recipe}: {'; '.join(parts)}; grey: loss of seed {shown.seed}"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _draw(axes: Axes, rows: Sequence[Row], series: Sequence[str], hue: str) -> tuple[float, float]:
    """Draw one group, and return its smallest and largest value; inf and −inf if it has none."""
    found = {name: [r for row in rows if (r := record_of(row, name))] for name in series}
    # A run that ended early or was read at another interval lacks some of these steps.
    steps = sorted({step for records in found.values() for record in records for step in record})
    curves = []
    for name, records in found.items():
        if name == "loss":
            records = [dict(zip(r, _smooth(r.values()), strict=True)) for r in records]
        values = [_floats(map(record.get, steps)) for record in records]
        curves += [over_finite(np.array(values), np.nanmedian)] if values else []
    stacked = np.array(curves)
    if not np.isfinite(stacked).any():
        return math.inf, -math.inf
    if len(curves) > 1:
        low, high = over_finite(stacked, np.nanmin), over_finite(stacked, np.nanmax)
        axes.fill_between(steps, low, high, color=hue, alpha=0.18, linewidth=0)
    axes.plot(steps, over_finite(stacked, np.nanmedian), color=hue, linewidth=1.1)
    return float(np.nanmin(stacked)), float(np.nanmax(stacked))


def _scale(axes: Axes, low: float, high: float) -> None:
    if low > 0 and high > _WIDE * low:
        use_log_scale(axes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array(list(values), dtype=float)  # None becomes NaN


def _smooth(losses: Iterable[float | None]) -> Floats:
    """Return centred medians, which remove batch noise; NaN where the loss is missing."""
    known, half = _floats(losses), _METRIC_WINDOW // 2
    medians = rolling(known, np.nanmedian, before=half, after=half)
    return np.where(np.isnan(known), np.nan, medians)


def _draw_loss(axes: Axes, row: Row) -> None:
    beside = axes.twinx()
    losses = _smooth(row.losses)
    beside.plot(np.arange(1, len(losses) + 1), losses, color=_GREY, linewidth=0.8, alpha=0.6)
    beside.set_yticks([])
    beside.grid(visible=False)
    beside.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)


def _mark(axes: Axes, row: Row) -> None:
    if row.explosion_step is not None:
        departure = departure_step(row.losses, row.explosion_step)
        axes.axvline(departure, color="black", linestyle="--", linewidth=0.8)
        axes.axvline(row.explosion_step, color="black", linewidth=0.8)
    elif "fault_start" in row.extra:
        axes.axvline(row.extra["fault_start"], color="black", linewidth=0.8)
