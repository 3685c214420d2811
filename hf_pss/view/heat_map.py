"""The stable rank of every matrix over time, for several runs on one colour scale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hf_pss.view.canvas import draw_cells, new_figure

Floats: TypeAlias = npt.NDArray[np.float64]

# The block is the first number of a parameter's path: transformer.h.3.attn.c_attn.weight[q].
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
OUTSIDE_BLOCKS = -1


@dataclass(frozen=True, slots=True, order=True)
class MatrixRow:
    """One row of the map: a role in a block. The experts of a block share a row."""

    block: int
    role: str


def row_of(name: str) -> MatrixRow:
    """Return the block and the role of a matrix, read from its name.

    >>> row_of("transformer.h.3.attn.c_attn.weight[q]")
    MatrixRow(block=3, role='attn.c_attn[q]')
    """
    match = _BLOCK.search(name)
    if match is None:
        return MatrixRow(OUTSIDE_BLOCKS, name.replace(".weight", ""))
    role = re.sub(r"\b\d+\b", "*", match[2].replace(".weight", ""))
    return MatrixRow(int(match[1]), role)


@dataclass(frozen=True, slots=True)
class HeatMapPanel:
    """The numbers of one panel."""

    title: str
    steps: Floats
    """(num_steps,), ascending."""
    names: Sequence[str]
    """The names of the matrices."""
    values: Floats
    """(num_steps, num_names); NaN where a step has no value."""


def heat_map_figure(
    panels: Sequence[HeatMapPanel], *, noise: Mapping[str, float] = MappingProxyType({})
) -> Figure | None:
    """Draw one panel per run: rows are matrices grouped by block, and columns are steps.

    Matrices of one role and block, such as experts, share a row, which shows the lowest value.

    Args:
        panels: The runs. Those without a step or a name are left out.
        noise: Stable ranks of noise by shape, which the colour bar marks.

    Returns:
        None if no panel is left.
    """
    panels = [panel for panel in panels if len(panel.steps) and panel.names]
    if not panels:
        return None
    rows = sorted({row_of(name) for panel in panels for name in panel.names})
    maps = [_lowest(panel, rows) for panel in panels]
    positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in maps])
    # A map without a finite value shows its background only.
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 2.0)
    scale = LogNorm(vmin=low, vmax=high if high > low else 2 * low)
    figure = new_figure(10, float(np.clip(0.085 * len(rows) + 1.2, 2.5, 9.0)))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel, values in zip(all_axes, panels, maps, strict=True):
        steps = panel.steps
        last_width = steps[-1] - steps[-2] if len(steps) > 1 else 1.0
        edges = np.append(steps, steps[-1] + last_width)
        draw_cells(axes, edges, values, scale, rasterized=True)
        axes.set_title(panel.title)
        axes.set_xlabel("step")
    _label_blocks(all_axes, rows)
    bar = figure.colorbar(all_axes[-1].collections[0], ax=list(all_axes), pad=0.01, fraction=0.05)
    _label_bar(bar.ax, low, high, noise)
    return figure


def _lowest(panel: HeatMapPanel, rows: list[MatrixRow]) -> Floats:
    """Return the lowest value of each row's matrices, (num_rows, num_steps).

    It is NaN where one of them is NaN, or where none has a value. A mean over experts would hide
    the expert that breaks.
    """
    index = {row: i for i, row in enumerate(rows)}
    found = np.full((len(rows), len(panel.steps)), np.inf)
    for name, values in zip(panel.names, panel.values.T, strict=True):
        row = found[index[row_of(name)]]
        # `minimum` keeps NaN.
        np.minimum(row, np.where(np.isfinite(values), values, np.nan), out=row)
    return np.where(np.isinf(found), np.nan, found)


def _label_blocks(panels: Iterable[Axes], rows: list[MatrixRow]) -> None:
    blocks = [row.block for row in rows]
    names = sorted(set(blocks))
    starts = [blocks.index(block) for block in names]
    centres = [start + blocks.count(block) / 2 for start, block in zip(starts, names, strict=True)]
    for axes in panels:
        for start in starts[1:]:
            axes.axhline(start, color="white", lw=0.8)
        axes.set_yticks(centres, ["other" if b == OUTSIDE_BLOCKS else f"block {b}" for b in names])
        axes.tick_params(axis="y", length=0)


def _label_bar(axes: Axes, low: float, high: float, noise: Mapping[str, float]) -> None:
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
