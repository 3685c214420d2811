"""The stable rank of every matrix over time, guards side by side on one colour scale."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hf_pss.evidence.report_records import Floats, RunDirectory, TrainingRun
from hf_pss.evidence.report_results import label
from hf_pss.view.canvas import new_figure

__all__ = ["OUTSIDE_BLOCKS", "noise_levels", "row_of", "stable_rank_figure"]

# The block is the first number of a parameter's path: transformer.h.3.attn.c_attn.weight[q].
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
OUTSIDE_BLOCKS = -1


@dataclass(frozen=True, slots=True, order=True)
class MatrixRow:
    """One row of the map: a role in a block; experts of one block share a row."""

    block: int
    role: str


def row_of(name: str) -> MatrixRow:
    """Find block and role in a matrix's name.

    >>> row_of("transformer.h.3.attn.c_attn.weight[q]")
    MatrixRow(block=3, role='attn.c_attn[q]')
    """
    match = _BLOCK.search(name)
    if match is None:
        return MatrixRow(OUTSIDE_BLOCKS, name.replace(".weight", ""))
    role = re.sub(r"\b\d+\b", "*", match[2].replace(".weight", ""))
    return MatrixRow(int(match[1]), role)


def noise_levels(directory: RunDirectory) -> dict[str, float]:
    """Stable rank of i.i.d. noise, mn/(√m + √n)², for every shape that the events name."""
    shapes = {
        tuple(sorted(matrix.shape))
        for run in directory.runs
        for event in run.interventions
        for matrix in event.matrices
        if len(matrix.shape) == 2 and min(matrix.shape) > 0
    }
    return {f"{m}×{n}": m * n / (m**0.5 + n**0.5) ** 2 for m, n in sorted(shapes)}


def stable_rank_figure(directory: RunDirectory) -> Figure | None:
    """Rows are matrices grouped by block, columns are steps; one panel a guard, its first seed.

    Returns:
        None where no run has recorded a stable rank.
    """
    runs = [run for guard in directory.guards for run in directory.of(guard)[:1] if _has_ranks(run)]
    if not runs:
        return None
    rows = sorted({row_of(name) for run in runs for name in run.stable_ranks.names})
    maps = [_lowest(run, rows) for run in runs]
    positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in maps])
    # Where nothing is finite the map has no colour, and says just that.
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 2.0)
    scale = LogNorm(vmin=low, vmax=high if high > low else 2 * low)
    figure = new_figure(10, float(np.clip(0.085 * len(rows) + 1.2, 2.5, 9.0)))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run, values in zip(panels, runs, maps, strict=True):
        _draw(axes, run, values, scale)
    _label_blocks(panels, rows)
    bar = figure.colorbar(panels[-1].collections[0], ax=list(panels), pad=0.01, fraction=0.05)
    _label_bar(bar.ax, low, high, noise_levels(directory))
    return figure


def _has_ranks(run: TrainingRun) -> bool:
    return bool(len(run.stable_ranks.steps) and run.stable_ranks.names)


def _lowest(run: TrainingRun, rows: list[MatrixRow]) -> Floats:
    """(num_rows, num_steps): the lowest of each row's matrices; NaN where one is, or none was read.

    A mean over experts would hide the one that breaks.
    """
    ranks = run.stable_ranks
    index = {row: i for i, row in enumerate(rows)}
    found = np.full((len(rows), len(ranks.steps)), np.inf)
    for name, values in zip(ranks.names, ranks.values.T, strict=True):
        row = found[index[row_of(name)]]
        # `minimum` hands NaN on.
        np.minimum(row, np.where(np.isfinite(values), values, np.nan), out=row)
    return np.where(np.isinf(found), np.nan, found)


def _draw(axes: Axes, run: TrainingRun, values: Floats, scale: LogNorm) -> None:
    axes.pcolormesh(
        _edges(run.stable_ranks.steps),
        np.arange(len(values) + 1),
        np.ma.masked_invalid(values),
        norm=scale,
        cmap="viridis",
        rasterized=True,
    )
    axes.set_facecolor("#eeeeee")
    axes.grid(visible=False)
    axes.set_title(f"{label(run.guard)}, seed {run.seed}")
    axes.set_xlabel("step")


def _edges(steps: Floats) -> Floats:
    """Borders of the cells: each lasts until the next one, the last as long as the one before."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1.0
    return np.append(steps, steps[-1] + last)


def _label_blocks(panels: Iterable[Axes], rows: list[MatrixRow]) -> None:
    blocks = [row.block for row in rows]
    names = sorted(set(blocks))
    starts = [blocks.index(block) for block in names]
    centres = [start + blocks.count(block) / 2 for start, block in zip(starts, names, strict=True)]
    for axes in panels:
        for start in starts[1:]:
            axes.axhline(start, color="white", lw=0.8)
        axes.set_ylim(len(rows), 0)
        axes.set_yticks(centres, ["other" if b == OUTSIDE_BLOCKS else f"block {b}" for b in names])
        axes.tick_params(axis="y", length=0)


def _label_bar(axes: Axes, low: float, high: float, noise: dict[str, float]) -> None:
    candidates = np.array([1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70])
    ticks = np.concatenate([candidates * 10.0**power for power in (0, 2, 4)])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.tick_params(which="minor", length=0, labelright=False)
    shown = {shape: level for shape, level in noise.items() if low < level < high}
    for level in shown.values():
        axes.axhline(level, color="white", lw=1.5)
    lines = f" (white lines: noise of {', '.join(shown)})" if shown else ""
    axes.set_ylabel(f"stable rank{lines}")
