"""Every live metric of a family of runs against the loss: one figure, a panel a metric."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hf_pss.report.canvas import new_figure, save_png, style, use_log_scale
from hf_pss.sweep.lead_time import departure_step
from hf_pss.sweep.rows import Row
from hf_pss.sweep.twin_band import Family, shared_metrics
from hf_pss.sweep.warning_rules import Record, record_of

__all__ = ["plot_family", "plot_metrics"]

_COLUMNS = 5
_GREY, _BLUE, _RED, _ORANGE = "#777777", "#0072B2", "#D55E00", "#E69F00"
_WIDE = 5.0  # what spans more than this factor is drawn on a logarithmic axis
_SMOOTHED_STEPS = 9
_DPI = 72  # twenty panels in less than 300 kB


def plot_metrics(families: Sequence[Family], folder: Path) -> list[Path]:
    """Draw each family; return the files, PNG."""
    files = []
    for family in families:
        # A row of another machine may hold any name, of a file elsewhere too.
        path = folder / f"metrics-{re.sub(r'[^A-Za-z0-9_.]+', '-', family.recipe)}.png"
        with style(), mpl.rc_context({"savefig.dpi": _DPI}):
            save_png(plot_family(family), path)
        files.append(path)
    return files


def plot_family(family: Family) -> Figure:
    """One panel a metric: twins blue, exploded runs red, survivors orange; the loss grey.

    Bands reach from the smallest to the largest series of the metric, lines are its median over
    matrices or its only series; both are medians over seeds. The loss is that of the first run that
    exploded (else of the first survivor), without a scale: the first panel has one. Lines mark the
    departure of its loss, dashed, and its explosion, or else the first step of its fault.
    """
    shown = (family.exploded or family.survivors)[0]
    metrics = shared_metrics((*family.twins, shown))
    num_rows = -(-len(metrics) // _COLUMNS)
    figure = new_figure(2.5 * _COLUMNS, 1.65 * num_rows + 0.5)
    panels = figure.subplots(num_rows, _COLUMNS, sharex=True, squeeze=False).flat
    for axes, (metric, series) in zip(panels, metrics.items(), strict=False):
        if metric != "loss":
            _draw_loss(axes, shown)
        groups = ((family.twins, _BLUE), (family.survivors, _ORANGE), (family.exploded, _RED))
        drawn = [_draw(axes, rows, series, hue) for rows, hue in groups]
        _scale(axes, min(low for low, _ in drawn), max(high for _, high in drawn))
        _mark(axes, shown)
        axes.set_title(metric, fontsize=8.5)
        axes.tick_params(labelsize=7)
    for axes in list(figure.axes)[len(metrics) : num_rows * _COLUMNS]:
        axes.set_axis_off()
    figure.suptitle(_title(family, shown), fontsize=10, x=0.01, ha="left")
    return figure


def _draw(axes: Axes, rows: Sequence[Row], series: Sequence[str], hue: str) -> tuple[float, float]:
    """Draw one group; return the smallest and the largest value drawn, inf and −inf for none."""
    found = {name: [r for row in rows if (r := record_of(row, name))] for name in series}
    # Of runs that ended early, or read at another rhythm, there is nothing at some of them.
    steps = np.array(sorted({s for records in found.values() for r in records for s in r.steps}))
    curves = [
        _over(np.array([_on(steps, r, name) for r in records]), np.nanmedian)
        for name, records in found.items()
        if records
    ]
    stacked = np.array(curves)
    if not np.isfinite(stacked).any():
        return math.inf, -math.inf
    if len(curves) > 1:
        low, high = _over(stacked, np.nanmin), _over(stacked, np.nanmax)
        axes.fill_between(steps, low, high, color=hue, alpha=0.18, linewidth=0)
    axes.plot(steps, _over(stacked, np.nanmedian), color=hue, linewidth=1.1)
    return float(np.nanmin(stacked)), float(np.nanmax(stacked))


def _on(steps: np.ndarray, record: Record, name: str) -> np.ndarray:
    """Return a record's values at these steps, ascending; NaN where it has none."""
    values = np.full(len(steps), math.nan)
    own = _smooth(record.values) if name == "loss" else np.array(record.values, dtype=float)
    values[np.searchsorted(steps, record.steps)] = own
    return values


def _scale(axes: Axes, low: float, high: float) -> None:
    if low > 0 and high > _WIDE * low:
        use_log_scale(axes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _smooth(values: Sequence[float | None]) -> np.ndarray:
    """Centred medians, which take batch noise out; NaN where the loss has none."""
    known = np.array([math.nan if v is None else v for v in values])
    half = _SMOOTHED_STEPS // 2
    windows = (known[max(0, i - half) : i + half + 1] for i in range(len(known)))
    return np.array(
        [
            math.nan if math.isnan(v) else np.nanmedian(w)
            for v, w in zip(known, windows, strict=True)
        ]
    )


def _over(values: np.ndarray, take: Callable[..., np.ndarray]) -> np.ndarray:
    """Reduce the first axis, passing over NaN; NaN where there is nothing else."""
    told = np.full(values.shape[1], np.nan)
    known = np.isfinite(values).any(axis=0)
    told[known] = take(np.where(np.isfinite(values), values, np.nan)[:, known], axis=0)
    return told


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


def _title(family: Family, shown: Row) -> str:
    def told(rows: Sequence[Row], what: str) -> str:
        rates = sorted({row.learning_rate for row in rows})
        return f"{len(rows)} {what} at {', '.join(f'{rate:g}' for rate in rates)}"

    parts = [told(family.twins, "twins (blue)")] if family.twins else ["no healthy twin"]
    if family.exploded:
        parts.append(told(family.exploded, "exploded (red)"))
    if family.survivors:
        parts.append(told(family.survivors, "neither (orange)"))
    return f"{family.recipe}: {'; '.join(parts)}; grey: loss of seed {shown.seed}"
