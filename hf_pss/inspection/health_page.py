"""An inspection as one HTML page: a map of blocks × kinds, and spectra beside noise spectra."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_pss.inspection.matrix_survey import ChangedMatrix, Inspection, JudgedMatrix, SeriesRow
from hf_pss.inspection.measure import MatrixHealth, spectrum_of
from hf_pss.records.strict_json import visible
from hf_pss.view import canvas

# A label that is longer than this would push the map off the page.
_LONGEST_LABEL = 40
_QUANTILES = 400
# Beyond these, float64 leaves no room for an axis around σ₁.
_LEAST_SIGMA, _MOST_SIGMA = 1e-300, 1e300
# A file may put every tensor in a block of its own and call each kind by another name.
_MOST_ROWS, _MOST_KINDS = 256, 64

_Cell: TypeAlias = tuple[tuple[str, int], str]
"""The stack and the block of a row, and the kind of a column."""


def map_figure(matrices: Sequence[JudgedMatrix]) -> Figure | None:
    """Draw stable ranks as shares of the stable rank of noise, by block (row) and kind (column).

    The experts of a block share a cell, which shows the lowest value. A cross marks NaN, inf
    or a zero matrix. Of very many blocks or kinds, only those with the worst matrices are drawn.

    Args:
        matrices: The matrices, with the worst first.

    Returns:
        None if no block is numbered, or no value is positive.
    """
    cells, bad = _cells(matrices)
    if not cells:
        return None
    # The cells are in the order of the matrices, with the worst first.
    all_rows, all_kinds = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    rows, kinds = sorted(all_rows[:_MOST_ROWS]), sorted(all_kinds[:_MOST_KINDS])
    row_index, kind_index = ({key: i for i, key in enumerate(keys)} for keys in (rows, kinds))
    values = np.full((len(rows), len(kinds)), np.nan)
    for (row, kind), value in cells.items():
        if row in row_index and kind in kind_index:
            values[row_index[row], kind_index[kind]] = value
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return None
    # The scale spans at least a decade, so that differences between random matrices do
    # not look large.
    low, high = min(float(positive.min()), 0.1), max(float(positive.max()), 1.0)
    height = float(np.clip(0.17 * len(rows) + 2.4, 3.2, 16.0))
    figure = canvas.new_figure(float(np.clip(0.5 * len(kinds) + 3, 6, 14)), height)
    axes = figure.subplots()
    scale = LogNorm(vmin=low, vmax=high)
    image = canvas.draw_cells(axes, np.arange(len(kinds) + 1), values, scale)
    for row, kind in bad:
        if row in row_index and kind in kind_index:
            place = (kind_index[kind] + 0.5, row_index[row] + 0.5)
            axes.plot(*place, marker="x", color="#D55E00", ms=7, mew=2)
    if len(rows) < len(all_rows) or len(kinds) < len(all_kinds):
        shown = f"{len(rows):,} of {len(all_rows):,} blocks, {len(kinds)} of {len(all_kinds):,}"
        axes.set_title(f"the worst: {shown} kinds")
    labels = [_short(kind) for kind in kinds]
    axes.set_xticks(np.arange(len(kinds)) + 0.5, labels, rotation=45, ha="right")
    step = max(1, len(rows) // 40)
    names = [f"{_short(stack)} {block}".strip() for stack, block in rows]
    axes.set_yticks(np.arange(len(rows))[::step] + 0.5, names[::step])
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
    bar.ax.set_ylabel("stable rank / that of noise")
    _plain_numbers(bar.ax.yaxis)
    return figure


def spectra_figure(spectra: Sequence[tuple[MatrixHealth, Sequence[float]]]) -> Figure | None:
    """Draw singular values by rank, beside those of noise with the same shape and ‖W‖_F.

    The shaded band covers the spectrum of i.i.d. noise, from |√m − √n| to √m + √n in units of
    ‖W‖_F/√(mn) (Marchenko & Pastur 1967; Bai & Yin 1993). The dashed line is its expected spectrum.
    """
    drawn = [
        (health, np.array(sigma))
        for health, sigma in spectra
        if sigma and _LEAST_SIGMA < sigma[0] < _MOST_SIGMA
    ]
    if not drawn:
        return None
    columns = min(3, len(drawn))
    num_rows = math.ceil(len(drawn) / columns)
    figure = canvas.new_figure(4.2 * columns, 2.9 * num_rows)
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes, (health, sigma) in zip(panels, drawn, strict=False):
        m, n = health.shape
        unit = health.frobenius / math.sqrt(m * n)
        share = (np.arange(len(sigma)) + 0.5) / len(sigma)
        low, high = (unit * abs(math.sqrt(m) + sign * math.sqrt(n)) for sign in (-1, 1))
        axes.axhspan(low, high, color="#56B4E9", alpha=0.15, lw=0)
        axes.plot(share, unit * noise_quantiles(m, n, share), "--", color="#0072B2", label="noise")
        axes.plot(share, np.where(sigma > 0, sigma, np.nan), color="#D55E00", label="matrix")
        canvas.use_log_scale(axes)
        _plain_numbers(axes.yaxis)
        axes.set_ylim(max(float(sigma[-1]), 1e-4 * float(sigma[0])) / 1.5, 1.5 * sigma[0])
        axes.set_title(f"{_short(health.name)}\n{m}×{n}", fontsize=8)
        axes.set_xlabel("place, as a share of all")
        axes.set_ylabel("σ")
    panels[0].legend()
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    return figure


def series_figure(rows: Sequence[SeriesRow]) -> Figure | None:
    """Draw stable ranks and σ₁ over the steps, or in the given order if names hold no steps.

    Returns:
        None if a panel would have no positive number to show.
    """
    steps = [row.step for row in rows if row.step is not None]
    places = steps if len(set(steps)) == len(rows) else list(range(1, len(rows) + 1))
    panels = (
        ("stable rank", {"median": "median_stable_rank", "lowest": "lowest_stable_rank"}),
        ("σ₁", {"largest": "largest_sigma1", "median": "median_sigma1"}),
    )
    figure = canvas.new_figure(8.4, 2.9)
    for axes, (title, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for label, field in lines.items():
            values = np.array([float(getattr(row, field)) for row in rows])
            drawn = (values > _LEAST_SIGMA) & (values < _MOST_SIGMA)
            if not drawn.any():
                return None
            axes.plot(places, np.where(drawn, values, np.nan), marker="o", ms=4, label=label)
        canvas.use_log_scale(axes)
        _plain_numbers(axes.yaxis)
        axes.set_ylabel(title)
        axes.set_xlabel("step" if places is steps else "checkpoint")
        axes.legend()
    return figure


def noise_quantiles(m: int, n: int, share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the singular values of large m×n noise of unit variance, with the largest first.

    This is the quantile function of Marchenko & Pastur's law, integrated numerically in σ. The
    density is √((b² − σ²)(σ² − a²)) / (π σ min(m, n)) between a = |√m − √n| and b = √m + √n.

    Args:
        m: Rows.
        n: Columns.
        share: (k,), positions in [0, 1]; 0 stands for the largest value.
    """
    a, b = abs(math.sqrt(m) - math.sqrt(n)), math.sqrt(m) + math.sqrt(n)
    # Midpoints avoid the only singularity, 0/0 at a = 0.
    edges = np.linspace(a, b, _QUANTILES + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.sqrt((b**2 - middle**2) * (middle**2 - a**2)) / middle
    above = np.append(0.0, np.cumsum(density[::-1]))
    found: npt.NDArray[np.float64] = np.interp(share, above / above[-1], edges[::-1])
    return found


def _cells(matrices: Sequence[JudgedMatrix]) -> tuple[dict[_Cell, float], set[_Cell]]:
    """Return the lowest positive share of each cell, and the cells with a broken matrix."""
    found: defaultdict[_Cell, list[float]] = defaultdict(list)
    bad = set()
    places = [one.health.place for one in matrices]
    has_one_stack = len({place.stack for place in places if place.block is not None}) == 1
    for one, place in zip(matrices, places, strict=True):
        if place.block is None:
            continue
        cell = (("" if has_one_stack else place.stack, place.block), place.kind)
        found[cell].append(one.health.stable_rank / one.health.noise)
        if not one.health.stable_rank > 0:
            bad.add(cell)
    lowest = {
        cell: min((v for v in values if v > 0), default=math.nan) for cell, values in found.items()
    }
    return lowest, bad


def _plain_numbers(axis: Axis) -> None:
    # The style parses no math, because names hold dollar signs and underscores. So 10^x would
    # appear as raw markup.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    text = visible(name)
    return text if len(text) <= _LONGEST_LABEL else "…" + text[-_LONGEST_LABEL:]


_MOST_SPECTRA = 6
# Largest matrix that is decomposed for the page alone: 4096 × 4096 takes half a minute.
_MOST_DECOMPOSED = 2**24
# A mixture-of-experts model has tens of thousands of matrices. --json has them all.
_MOST_LINES = 1000


def render_page(
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[ChangedMatrix] = (),
    rows: Sequence[SeriesRow] = (),
) -> str:
    """Return HTML: a map of the stable ranks, the spectra of the worst matrices, and all numbers.

    Cost: apart from drawing, one exact decomposition for each of the six worst finite matrices with
    at most 2^24 numbers, unless the inspection was exact.

    Args:
        inspection: The first checkpoint.
        other: The checkpoint to compare it with, on the same page.
        changes: Changes from `inspection` to `other`.
        rows: Rows of a series that `inspection` begins and `other` ends.

    Raises:
        StateError: A file has become shorter since it was inspected.
        OSError: A file can no longer be read.
    """
    with canvas.style():
        series = canvas.inline_svg({"series": series_figure(rows)}) if rows else {}
    sections = [_section(one) for one in (inspection, other) if one is not None]
    values = {
        "sections": sections,
        "rows": rows,
        "series": series,
        "changes": changes[:_MOST_LINES],
        "num_changes": len(changes),
        "most_lines": _MOST_LINES,
        "nan": math.nan,
    }
    return canvas.render_template("hf_pss.inspection", "page.html.j2", values)


def _section(inspection: Inspection) -> Mapping[str, object]:
    shown = list(_spectra(inspection.matrices))
    with canvas.style():
        drawn = canvas.inline_svg(
            {"map": map_figure(inspection.matrices), "spectra": spectra_figure(shown)}
        )
    return {
        "inspection": inspection,
        "lines": inspection.matrices[:_MOST_LINES],
        "figures": drawn,
        "num_too_large": sum(_is_too_large(one) for one in inspection.matrices[:_MOST_SPECTRA]),
    }


def _spectra(
    matrices: Sequence[JudgedMatrix],
) -> Iterator[tuple[MatrixHealth, Sequence[float]]]:
    sound = [one for one in matrices if one.health.frobenius > 0 and not _is_too_large(one)]
    for one in sound[:_MOST_SPECTRA]:
        health = one.health
        sigma = health.spectrum or spectrum_of(health.source, health.expert)
        if sigma is not None:
            yield health, sigma


def _is_too_large(one: JudgedMatrix) -> bool:
    m, n = one.health.shape
    return one.health.spectrum is None and m * n > _MOST_DECOMPOSED
