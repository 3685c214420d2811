"""The tracker interface, and the numbers, names and tables that every tracker receives."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hf_pss.records.events import HealthReading
from hf_pss.records.messages import Alert

__all__ = [
    "NONFINITE_SPECTRA",
    "Curves",
    "Histogram",
    "Image",
    "Snapshot",
    "ThinnedReadings",
    "Tracker",
    "histogram_of",
    "label_of",
    "num_broken",
    "scalars_of",
    "worst_first",
]

logger = logging.getLogger(__name__)

Image: TypeAlias = npt.NDArray[np.uint8]
"""RGB pixels of shape (height, width, 3)."""

NUM_BINS = 64
NONFINITE_SPECTRA = "nonfinite_spectra"

_PART = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram as counts and bin edges, which all trackers accept."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    """The bin edges in ascending order. There is one more edge than there are counts."""
    values: npt.NDArray[np.float64]
    """The values that were counted. All of them are finite."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run so far, as one table and, if it could be drawn, one heat map."""

    step: int
    columns: tuple[str, ...]
    rows: tuple[tuple[int | str | float | None, ...], ...]
    """Each row holds the step, the matrix and its metrics. A metric is None if it was not measured
    at that step."""
    heat_map: Image | None


class Tracker(ABC):
    """One tracker. A method may raise an exception, which `Trackers` turns into one warning."""

    name: str
    """The name that ``report_to`` uses for the tracker."""
    max_rows: int
    """The largest number of rows that a table in this tracker may have."""

    @abstractmethod
    def report(self, reading: HealthReading) -> None:
        """Log the numbers of a reading and histograms of its spectra."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Raise an alert."""

    @abstractmethod
    def snapshot(self, snapshot: Snapshot) -> None:
        """Log the table and the heat map. Each call replaces the previous ones of the same name."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to close
        """Finish the output of PSS. The Trainer owns the tracker's run, so it stays open."""


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
    if reading.spectra and NONFINITE_SPECTRA not in reading.scalars:
        # A histogram cannot show NaN, so the number of spectra that hold NaN or inf is logged.
        yield f"pss/{NONFINITE_SPECTRA}", num_broken(reading.spectra)


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


def num_broken(spectra: Mapping[str, tuple[float, ...]]) -> float:
    """Count the spectra that hold NaN or inf."""
    return float(sum(not np.isfinite(values).all() for values in spectra.values()))


# The largest number of curves for one metric, which we chose. A dense 70B model has 560 matrices,
# and a mixture-of-experts model has up to 20,000.
MAX_CURVES = 1024
# A model with more matrices than MAX_CURVES gets NUM_PLACES curves. The first reading fills half of
# these places. The other half is for matrices that become some of the worst later.
NUM_PLACES, NUM_NEWCOMERS = 128, 8

_Value = TypeVar("_Value")


def worst_first(matrices: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the names of all matrices, from the worst to the best.

    Matrices with NaN or inf in a metric come first. The others are sorted by ascending stable rank.

    >>> worst_first({"stable_rank": {"a": 9.0, "b": 2.0, "c": 3.0}, "grad_norm": {"c": math.inf}})
    ['c', 'b', 'a']
    """
    names = dict.fromkeys(name for values in matrices.values() for name in values)
    broken = {n for values in matrices.values() for n, x in values.items() if not math.isfinite(x)}
    ranks = matrices.get("stable_rank", {})
    known = {name: rank for name, rank in ranks.items() if not math.isnan(rank)}
    return sorted(names, key=lambda name: (name not in broken, known.get(name, math.inf), name))


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
        self._admit(worst_first(reading.matrices), most)
        scalars = dict(reading.scalars)
        if reading.spectra:
            scalars.setdefault(NONFINITE_SPECTRA, num_broken(reading.spectra))
        return replace(
            reading,
            scalars=scalars,
            matrices={metric: self._chosen(values) for metric, values in reading.matrices.items()},
            spectra=self._chosen(reading.spectra),
        )

    def _admit(self, worst: list[str], num_matrices: int) -> None:
        if not self._names:
            self._names = dict.fromkeys(worst[: NUM_PLACES // 2])
            logger.warning(
                "This model has %d matrices. Trackers get curves of the %d worst of them, and "
                "scalars over all. The files beside the checkpoints have everything.",
                num_matrices,
                NUM_PLACES,
            )
            return
        for name in worst[:NUM_NEWCOMERS]:
            if len(self._names) < NUM_PLACES:
                self._names[name] = None

    def _chosen(self, values: Mapping[str, _Value]) -> Mapping[str, _Value]:
        if len(values) <= MAX_CURVES:
            return values
        return {name: values[name] for name in self._names if name in values}


# The largest number of columns in the heat map. More columns would be narrower than its pixels.
MAX_READINGS = 512
# The largest count of numbers in all readings. They take about 25 MB as floats in dictionaries.
MAX_NUMBERS = 2**18


@dataclass(frozen=True, slots=True)
class _Kept:
    step: int
    matrices: Mapping[str, Mapping[str, float]]


class ThinnedReadings:
    """Keeps readings of matrices in bounded memory.

    When there are too many readings, every second one is dropped. The first reading and the newest
    reading are always kept.
    """

    def __init__(self, *, max_readings: int = MAX_READINGS) -> None:
        self._max = max_readings
        self._kept: list[_Kept] = []
        self._newest: _Kept | None = None
        self._stride = 1
        self.num_seen = 0

    def add(self, reading: HealthReading) -> None:
        """Add a reading. A reading without any number of a matrix is ignored."""
        if not reading.matrices:
            return
        self._newest = _Kept(reading.step, reading.matrices)
        if self.num_seen % self._stride == 0:
            self._kept.append(self._newest)
        self.num_seen += 1
        if len(self._kept) > self._max or self._is_too_large():
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def kept(self) -> Sequence[_Kept]:
        """The readings that are kept, in the order of their steps."""
        if self._newest is None or self._kept[-1] is self._newest:
            return list(self._kept)
        return [*self._kept, self._newest]

    def metrics(self) -> tuple[str, ...]:
        """Return the names of all matrix metrics, in the order in which they first appeared."""
        return tuple(dict.fromkeys(name for kept in self.kept for name in kept.matrices))

    def rows(self, *, max_rows: int) -> tuple[tuple[int | str | float | None, ...], ...]:
        """Return table rows, each with the step, the matrix and its metrics.

        If not all readings fit into `max_rows`, the rows come from evenly spaced readings, as many
        as fit. The newest reading is always included. If it does not fit on its own, only its worst
        matrices are included.
        """
        readings, metrics = self.kept, self.metrics()
        sizes = [
            len({name for found in kept.matrices.values() for name in found}) for kept in readings
        ]
        stride = 1
        # The stride counts backwards from the end, so that the newest reading stays.
        while stride < len(readings) and sum(sizes[::-1][::stride]) > max_rows:
            stride += 1
        chosen = readings[::-1][::stride][::-1]
        return tuple(
            (
                kept.step,
                name,
                *(kept.matrices.get(metric, {}).get(name) for metric in metrics),
            )
            for kept in chosen
            for name in _names(kept, max_rows)
        )

    def _is_too_large(self) -> bool:
        return len(self._kept) > 2 and sum(map(_size, self._kept)) > MAX_NUMBERS


def _size(kept: _Kept) -> int:
    return sum(map(len, kept.matrices.values()))


def _names(kept: _Kept, most: int) -> Sequence[str]:
    names = tuple(dict.fromkeys(name for found in kept.matrices.values() for name in found))
    return names if len(names) <= most else worst_first(kept.matrices)[:most]
