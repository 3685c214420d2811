"""The numbers, names, tables and pictures that every tracker receives."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hf_pss.records.events import HealthReading

logger = logging.getLogger(__name__)

Image: TypeAlias = npt.NDArray[np.uint8]
"""RGB pixels of shape (height, width, 3)."""
ByMetric: TypeAlias = Mapping[str, Mapping[str, float]]
"""Numbers by metric, and then by matrix."""

NUM_BINS = 64
_NONFINITE_SPECTRA = "nonfinite_spectra"
_NOT_FINITE_COLOUR = "#D55E00"
_PART = re.compile(r"\[(\w+)\]")


# ---- names, numbers and histograms ----


def names_of(matrices: ByMetric) -> list[str]:
    """Return the names of all matrices, in the order in which they first appear."""
    return list(dict.fromkeys(name for values in matrices.values() for name in values))


def label_of(matrix: str) -> str:
    """Turn the name of a matrix into a tag that no tracker interprets as a folder.

    >>> label_of("transformer.h.0.attn.c_attn.weight[q]")
    'transformer.h.0.attn.c_attn.q'
    """
    bare = _PART.sub(r".\1", matrix.replace(".weight", ""))
    return re.sub(r"[^\w.-]", "_", bare)


def scalars_of(reading: HealthReading) -> Iterator[tuple[str, float]]:
    """Yield each number of a reading with its tag.

    Numbers of the model have tags ``pss/…``, those of matrices ``pss_health/metric/matrix``.
    """
    for name, value in reading.scalars.items():
        yield f"pss/{name.removeprefix('pss/')}", value
    for metric, by_matrix in reading.matrices.items():
        for matrix, value in by_matrix.items():
            yield f"pss_health/{metric}/{label_of(matrix)}", value
    if reading.spectra and _NONFINITE_SPECTRA not in reading.scalars:
        # A histogram cannot show NaN, so the number of spectra that hold NaN or inf is logged.
        yield f"pss/{_NONFINITE_SPECTRA}", _num_broken(reading.spectra)


def _num_broken(spectra: Mapping[str, tuple[float, ...]]) -> float:
    return float(sum(not np.isfinite(values).all() for values in spectra.values()))


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram as counts and bin edges, which all trackers accept."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    """The bin edges in ascending order. There is one more edge than there are counts."""
    values: npt.NDArray[np.float64]
    """The values that were counted. All of them are finite."""


def histogram_of(values: tuple[float, ...]) -> Histogram | None:
    """Return a histogram of singular values from 0 to σ₁, or None if no value is finite.

    The histogram leaves out NaN and inf, because no tracker accepts them in a histogram.
    `scalars_of` yields the number of spectra that hold such values.
    """
    found = np.asarray(values, dtype=np.float64)
    finite = found[np.isfinite(found)]
    if not len(finite):
        return None
    top = float(finite.max())
    # A subnormal range cannot be divided into bins. Such a matrix is practically zero.
    width = top if top > np.finfo(np.float64).tiny * NUM_BINS else 1.0
    counts, edges = np.histogram(finite, bins=NUM_BINS, range=(0.0, width))
    return Histogram(counts, edges, finite)


# ---- curves ----

# The largest number of curves for one metric, which we chose. A dense 70B model has 560 matrices,
# and a mixture-of-experts model has up to 20,000.
MAX_CURVES = 1024
# A model with more matrices than MAX_CURVES gets NUM_PLACES curves. The first reading fills half of
# these places. The other half is for matrices that become some of the worst later.
NUM_PLACES, NUM_NEWCOMERS = 128, 8

_Value = TypeVar("_Value")


def _worst_first(matrices: ByMetric) -> list[str]:
    """Return the names of all matrices, from the worst to the best.

    Matrices with NaN or inf in a metric come first. The others are sorted by ascending stable rank.

    >>> _worst_first({"stable_rank": {"a": 9.0, "b": 2.0, "c": 3.0}, "grad_norm": {"c": math.inf}})
    ['c', 'b', 'a']
    """
    broken = {n for values in matrices.values() for n, x in values.items() if not math.isfinite(x)}
    ranks = matrices.get("stable_rank", {})
    known = {name: rank for name, rank in ranks.items() if not math.isnan(rank)}
    return sorted(
        names_of(matrices), key=lambda name: (name not in broken, known.get(name, math.inf), name)
    )


class Curves:
    """Chooses which matrices get curves: all of them, or only the worst if there are very many.

    A matrix that has a curve keeps it for the rest of the run, so that the curve has no gaps.
    Without this rule every matrix would get a curve in a long run, because each of them is among
    the worst at some time.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def of(self, reading: HealthReading) -> HealthReading:
        """Return the reading with only the chosen matrices. Its ``scalars`` still cover all."""
        most = max(map(len, (*reading.matrices.values(), reading.spectra)))
        if most <= MAX_CURVES:
            return reading
        worst = _worst_first(reading.matrices)
        if not self._names:
            self._names = dict.fromkeys(worst[: NUM_PLACES // 2])
            logger.warning(
                "This model has %d matrices. Trackers get curves of the %d worst of them, and "
                "scalars over all. The files beside the checkpoints have everything.",
                most,
                NUM_PLACES,
            )
        else:
            newcomers = [name for name in worst[:NUM_NEWCOMERS] if name not in self._names]
            self._names |= dict.fromkeys(newcomers[: NUM_PLACES - len(self._names)])
        scalars = dict(reading.scalars)
        if reading.spectra:
            scalars.setdefault(_NONFINITE_SPECTRA, _num_broken(reading.spectra))
        return replace(
            reading,
            scalars=scalars,
            matrices={metric: self._chosen(values) for metric, values in reading.matrices.items()},
            spectra=self._chosen(reading.spectra),
        )

    def _chosen(self, values: Mapping[str, _Value]) -> Mapping[str, _Value]:
        if len(values) <= MAX_CURVES:
            return values
        return {name: values[name] for name in self._names if name in values}


# ---- the table and the heat map ----

# The largest number of columns in the heat map. More columns would be narrower than its pixels.
MAX_READINGS = 512
# The largest count of numbers in all readings. They take about 25 MB as floats in dictionaries.
MAX_NUMBERS = 2**18

Rows: TypeAlias = tuple[tuple[int | str | float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run so far, as one table and, if it could be drawn, one heat map."""

    step: int
    columns: tuple[str, ...]
    rows: Rows
    """Each row holds the step, the matrix and its metrics. A metric is None if it was not measured
    at that step."""
    heat_map: Image | None


class ThinnedReadings:
    """Keeps readings of matrices in bounded memory.

    When there are too many readings, every second one is dropped. The first reading and the newest
    reading are always kept.
    """

    def __init__(self, *, max_readings: int = MAX_READINGS) -> None:
        self._max = max_readings
        self._kept: list[HealthReading] = []
        self._newest: HealthReading | None = None
        self._stride = 1
        self.num_seen = 0

    def add(self, reading: HealthReading) -> None:
        """Add a reading. A reading without any number of a matrix is ignored."""
        if not reading.matrices:
            return
        self._newest = HealthReading(reading.step, matrices=reading.matrices)
        if self.num_seen % self._stride == 0:
            self._kept.append(self._newest)
        self.num_seen += 1
        num_numbers = sum(len(found) for kept in self._kept for found in kept.matrices.values())
        if len(self._kept) > self._max or (len(self._kept) > 2 and num_numbers > MAX_NUMBERS):
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def kept(self) -> Sequence[HealthReading]:
        """The readings that are kept, in the order of their steps."""
        if self._newest is None or self._kept[-1] is self._newest:
            return list(self._kept)
        return [*self._kept, self._newest]

    def metrics(self) -> tuple[str, ...]:
        """Return the names of all matrix metrics, in the order in which they first appeared."""
        return tuple(dict.fromkeys(name for kept in self.kept for name in kept.matrices))

    def rows(self, *, max_rows: int) -> Rows:
        """Return table rows, each with the step, the matrix and its metrics.

        If not all readings fit into `max_rows`, the rows come from evenly spaced readings, as many
        as fit. The newest reading is always included. If it does not fit on its own, only its worst
        matrices are included.
        """
        newest_first, metrics, stride = self.kept[::-1], self.metrics(), 1
        sizes = [len(names_of(kept.matrices)) for kept in newest_first]
        while stride < len(sizes) and sum(sizes[::stride]) > max_rows:
            stride += 1
        rows = []
        for kept in newest_first[::stride][::-1]:
            names = names_of(kept.matrices)
            if len(names) > max_rows:
                names = _worst_first(kept.matrices)[:max_rows]
            columns = [kept.matrices.get(metric, {}) for metric in metrics]
            rows += [(kept.step, name, *(found.get(name) for found in columns)) for name in names]
        return tuple(rows)


def draw_heat_map(readings: ThinnedReadings) -> Image | None:
    """Draw the stable rank of every matrix as a heat map.

    Rows are matrices in the order of their blocks, and columns are steps. NaN is orange. Drawing 72
    matrices at 100 steps takes 0.34 s on one core, or 1.5 s with the import of matplotlib.

    Returns:
        The picture, or None if no reading has a stable rank.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from hf_pss.view.heat_map import HeatMapPanel, heat_map_figure

    kept = [one for one in readings.kept if "stable_rank" in one.matrices]
    ranks = [one.matrices["stable_rank"] for one in kept]
    names = tuple(dict.fromkeys(name for by_name in ranks for name in by_name))
    values = [[by_name.get(name, np.nan) for name in names] for by_name in ranks]
    panel = HeatMapPanel(
        title="stable rank, matrices by block, experts at their lowest; "
        "orange: not finite, or not read",
        steps=np.array([one.step for one in kept], dtype=np.float64),
        names=names,
        values=np.array(values, dtype=np.float64).reshape(len(ranks), len(names)),
    )
    figure = heat_map_figure([panel])
    if figure is None:
        return None
    figure.axes[0].set_facecolor(_NOT_FINITE_COLOUR)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
