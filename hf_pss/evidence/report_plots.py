"""Draw the curves of a run directory: losses, gradient norms, and a wide figure for a README."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_pss.evidence.report_records import (
    Curve,
    Floats,
    RunDirectory,
    TrainingRun,
    load_run_directory,
)
from hf_pss.evidence.report_results import label
from hf_pss.view.canvas import (
    Axes,
    Figure,
    Line2D,
    colour,
    mark_level,
    new_figure,
    save_png,
    style,
    use_log_scale,
)
from hf_pss.view.heat_map import HeatMapPanel, heat_map_figure

__all__ = [
    "colour_of",
    "gradient_figure",
    "headline_plot",
    "loss_figure",
    "moving_average",
    "noise_levels",
    "stable_rank_figure",
]

# A window of 1/40 of the run removes the noise of single batches and keeps a spike of ten
# steps visible.
_SMOOTHING_FRACTION = 1 / 40
# A loss far above the first one only shows that the run is lost, so the axis ends here.
_LOSS_HEADROOM = 1.15
# The axis of the norms ends four decades from their median. Otherwise one explosion would
# flatten the rest.
_GRADIENT_HEADROOM = 1e4
# A logarithmic axis can show neither zero nor a number that is zero in float32.
_SMALLEST_NORM = float(np.finfo(np.float32).tiny)
_DASHES = (0, (3, 2))


def moving_average(values: Floats, window: int) -> Floats:
    """Return the centred mean over the finite values in a window; NaN if it holds none.

    >>> moving_average(np.array([1.0, np.nan, 3.0]), 3).tolist()
    [1.0, 2.0, 3.0]
    """
    if len(values) == 0:
        return values
    finite = np.isfinite(values)
    kernel = np.ones(min(window, len(values)) | 1)
    half = len(kernel) // 2
    sums = np.convolve(np.where(finite, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(finite.astype(np.float64), kernel)[half : half + len(values)]
    means = np.full_like(sums, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0.5)
    return means


def loss_figure(directory: RunDirectory) -> Figure:
    """Draw the validation loss beside the training loss, for all guards and seeds."""
    figure = new_figure(10, 3.9)
    validation, training = figure.subplots(1, 2)
    for run in directory.runs:
        tint = colour_of(directory, run.guard)
        validation.plot(run.eval_loss.steps, run.eval_loss.values, color=tint, marker="o", ms=2.5)
        _plot_training_loss(training, run, tint)
    limit = _loss_limit(directory)
    for axes, title in ((validation, "Validation loss"), (training, "Training loss")):
        _finish(axes, title)
        _cut_above(axes, limit)
        _mark_unigram_entropy(axes, directory)
    _mark_nonfinite(training, directory)
    _legend(figure, directory)
    return figure


def gradient_figure(directory: RunDirectory) -> Figure:
    """Draw the gradient norm, baseline and threshold of each guard's first seed."""
    figure = new_figure(10, 3.4)
    panels = figure.subplots(1, len(directory.guards), sharex=True, sharey=True, squeeze=False)[0]
    for axes, guard in zip(panels, directory.guards, strict=True):
        run = directory.of(guard)[0]
        _plot_gradient(axes, run, colour_of(directory, guard))
        _finish(axes, f"{label(guard)}, seed {run.seed}")
    norms = [directory.of(guard)[0].grad_norm_preclip.finite for guard in directory.guards]
    _scale_norms(panels[0], np.concatenate(norms))
    panels[0].set_ylabel("norm before clipping")
    handles = [
        Line2D([], [], color="black", lw=0.9, label="baseline"),
        Line2D([], [], color="black", lw=0.9, ls=_DASHES, label="threshold"),
        Line2D([], [], color="black", lw=0, marker="v", ms=3, label="intervention"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def headline_plot(run_dir: Path, out_png: Path) -> None:
    """Draw all guards in one wide figure: the loss on the left, the stable rank on the right.

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
        for guard in directory.guards:
            runs, tint = directory.of(guard), colour_of(directory, guard)
            _plot_mean_and_range(left, [run.eval_loss for run in runs], tint)
            _plot_mean_and_range(right, [_mean_stable_rank(run) for run in runs], tint)
        _finish(left, f"Validation loss{_seed_note(directory)}")
        _cut_above(left, _loss_limit(directory))
        _finish(right, "Stable rank, mean over all selected matrices")
        right.set_ylim(bottom=0)
        _legend(figure, directory)
        save_png(figure, out_png)


def _plot_training_loss(axes: Axes, run: TrainingRun, tint: str) -> None:
    window = max(1, round(len(run.loss) * _SMOOTHING_FRACTION))
    axes.plot(run.loss.steps, run.loss.values, color=tint, alpha=0.15, lw=0.7)
    axes.plot(run.loss.steps, moving_average(run.loss.values, window), color=tint)


def _plot_gradient(axes: Axes, run: TrainingRun, tint: str) -> None:
    axes.plot(run.grad_norm_preclip.steps, run.grad_norm_preclip.values, color=tint, lw=0.8)
    axes.plot(run.baseline.steps, run.baseline.values, color="black", lw=0.9)
    axes.plot(run.threshold.steps, run.threshold.values, color="black", lw=0.9, ls=_DASHES)
    steps = [event.step for event in run.interventions]
    axes.plot(steps, [0.96] * len(steps), "kv", ms=3, transform=axes.get_xaxis_transform())


def _scale_norms(axes: Axes, norms: Floats) -> None:
    """Make a shared axis logarithmic, with room at the top for the marks of interventions."""
    norms = norms[norms > _SMALLEST_NORM]
    if not len(norms):
        return
    low, high, median = (float(f(norms)) for f in (np.min, np.max, np.median))
    bottom = max(low / 1.5, median / _GRADIENT_HEADROOM)
    top = 4 * min(high, median * _GRADIENT_HEADROOM)
    # The limits come first, because matplotlib warns about its default limits on a
    # logarithmic axis.
    axes.set_ylim(bottom, top)
    use_log_scale(axes)
    if high > top:
        _note(axes, f"cut off; the largest is {high:.3g}", height=0.86)


def _plot_mean_and_range(axes: Axes, curves: Sequence[Curve], tint: str) -> None:
    """Draw the mean and the range over seeds, where every seed has a finite value."""
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    axes.plot(steps, values.mean(axis=0), color=tint, lw=2)
    if len(curves) > 1:
        axes.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=tint, alpha=0.15, lw=0
        )


def _mean_stable_rank(run: TrainingRun) -> Curve:
    ranks = run.stable_ranks
    if not ranks.names:
        return Curve(ranks.steps, np.full(len(ranks.steps), np.nan))
    finite = np.isfinite(ranks.values)
    sums, counts = np.where(finite, ranks.values, 0.0).sum(axis=1), finite.sum(axis=1)
    return Curve(ranks.steps, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))


def _loss_limit(directory: RunDirectory) -> float:
    first = [float(run.loss.finite[0]) for run in directory.runs if len(run.loss.finite)]
    entropy = directory.unigram_entropy_nats
    known = [*first, *([] if math.isnan(entropy) else [entropy])]
    return _LOSS_HEADROOM * max(known) if known else math.inf


def _cut_above(axes: Axes, limit: float) -> None:
    curves = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    values = np.concatenate(curves) if curves else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values) or values.max() <= limit:
        return
    low = min(float(values.min()), limit)
    axes.set_ylim(low - 0.05 * (limit - low), limit)
    _note(axes, f"cut off; the highest is {values.max():.3g}", height=0.02)


def _mark_unigram_entropy(axes: Axes, directory: RunDirectory) -> None:
    entropy = directory.unigram_entropy_nats
    low, high = axes.get_ylim()
    if not math.isnan(entropy) and low < entropy < high:
        mark_level(axes, entropy, "unigram entropy")


def _mark_nonfinite(axes: Axes, directory: RunDirectory) -> None:
    for run in directory.runs:
        steps = run.loss.steps[np.isnan(run.loss.values)]
        if len(steps):
            axes.plot(
                steps,
                np.full(len(steps), 0.985),
                "x",
                color=colour_of(directory, run.guard),
                ms=4,
                transform=axes.get_xaxis_transform(),
            )


def _legend(figure: Figure, directory: RunDirectory) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colour_of(directory, guard),
            lw=2,
            label=label(guard),
        )
        for guard in directory.guards
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.margins(x=0.02)


def _note(axes: Axes, text: str, *, height: float) -> None:
    axes.text(
        0.02,
        height,
        text,
        transform=axes.transAxes,
        fontsize=7.5,
        color="#777777",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )


def _seed_note(directory: RunDirectory) -> str:
    count = len(directory.seeds)
    return ", one seed" if count == 1 else f", mean and range of {count} seeds"


def colour_of(directory: RunDirectory, guard: str) -> str:
    """Return the colour of a guard in all figures."""
    return colour(guard, directory.guards, directory.reference)


def stable_rank_figure(directory: RunDirectory) -> Figure | None:
    """Draw the stable ranks of each guard's first seed; None if no run has recorded one."""
    panels = [
        HeatMapPanel(
            title=f"{label(guard)}, seed {run.seed}",
            steps=run.stable_ranks.steps,
            names=run.stable_ranks.names,
            values=run.stable_ranks.values,
        )
        for guard in directory.guards
        for run in directory.of(guard)[:1]
    ]
    return heat_map_figure(panels, noise=noise_levels(directory))


def noise_levels(directory: RunDirectory) -> dict[str, float]:
    """Return the stable rank of i.i.d. noise, mn/(√m + √n)², for each shape in the events."""
    shapes = {
        tuple(sorted(matrix.shape))
        for run in directory.runs
        for event in run.interventions
        for matrix in event.matrices
        if len(matrix.shape) == 2 and min(matrix.shape) > 0
    }
    return {f"{m}×{n}": m * n / (m**0.5 + n**0.5) ** 2 for m, n in sorted(shapes)}
