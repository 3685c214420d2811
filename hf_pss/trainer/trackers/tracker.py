"""The interface of a tracker, and the numbers, names and tables that every tracker gets."""

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

from hf_pss.records.messages import Alert
from hf_pss.records.steps import HealthReading

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
"""(height, width, 3), RGB."""

NUM_BINS = 64
NONFINITE_SPECTRA = "nonfinite_spectra"

_PART = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges, the form that all trackers accept."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    """One more than counts, ascending."""
    values: npt.NDArray[np.float64]
    """The counted values; finite."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run so far: one table, and one picture where it could be drawn."""

    step: int
    columns: tuple[str, ...]
    rows: tuple[tuple[int | str | float | None, ...], ...]
    """(step, matrix, metrics …); None where a step did not measure the metric."""
    heat_map: Image | None


class Tracker(ABC):
    """One tracker. Methods may raise: `Trackers` turns that into one warning."""

    name: str
    """As in ``report_to``."""
    max_rows: int
    """Rows of a table that the tracker can hold and open."""

    @abstractmethod
    def report(self, reading: HealthReading) -> None:
        """Log a reading's numbers, and histograms of its spectra."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Raise an alert."""

    @abstractmethod
    def snapshot(self, snapshot: Snapshot) -> None:
        """Log table and heat map, under the same names each time: the newest counts."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to close
        """End the output. The tracker's run belongs to the Trainer and stays open."""


def label_of(matrix: str) -> str:
    """Return a matrix's name as a tag that no tracker mistakes for a folder.

    >>> label_of("transformer.h.0.attn.c_attn.weight[q]")
    'transformer.h.0.attn.c_attn.q'
    """
    bare = _PART.sub(r".\1", matrix.replace(".weight", ""))
    return re.sub(r"[^\w.-]", "_", bare)


def scalars_of(reading: HealthReading) -> Iterator[tuple[str, float]]:
    """Yield all numbers by tag: ``pss/…`` of the model, ``pss_health/metric/matrix`` of each."""
    for name, value in reading.scalars.items():
        yield f"pss/{name.removeprefix('pss/')}", value
    for metric, by_matrix in reading.matrices.items():
        for matrix, value in by_matrix.items():
            yield f"pss_health/{metric}/{label_of(matrix)}", value
    if reading.spectra and NONFINITE_SPECTRA not in reading.scalars:
        # A histogram cannot show NaN, and an empty panel does not show that there was one.
        yield f"pss/{NONFINITE_SPECTRA}", num_broken(reading.spectra)


def histogram_of(values: tuple[float, ...]) -> Histogram | None:
    """Count singular values between 0 and σ₁; None where none is finite.

    NaN and inf are left out, because no tracker's histogram accepts them. `scalars_of` counts such
    spectra.
    """
    found = np.asarray(values, dtype=np.float64)
    finite = found[np.isfinite(found)]
    if not len(finite):
        return None
    top = float(finite.max())
    # Subnormal ranges cannot be divided; such a matrix is as good as zero.
    width = top if top > np.finfo(np.float64).tiny * NUM_BINS else 1.0
    counts, edges = np.histogram(finite, bins=NUM_BINS, range=(0.0, width))
    return Histogram(counts, edges, finite)


def num_broken(spectra: Mapping[str, tuple[float, ...]]) -> float:
    """Count the spectra that hold NaN or inf."""
    return float(sum(not np.isfinite(values).all() for values in spectra.values()))


# Of one metric [ours]. A dense model of 70B has 560 matrices, a model of experts up to 20,000.
MAX_CURVES = 1024
# Of a metric with more matrices: half of these places at once, the others for matrices that later
# become one of the worst.
NUM_PLACES, NUM_NEWCOMERS = 128, 8

_Value = TypeVar("_Value")


def worst_first(matrices: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the matrices of all metrics: those with NaN or inf first, then by lowest stable rank.

    >>> worst_first({"stable_rank": {"a": 9.0, "b": 2.0, "c": 3.0}, "grad_norm": {"c": math.inf}})
    ['c', 'b', 'a']
    """
    names = dict.fromkeys(name for values in matrices.values() for name in values)
    broken = {n for values in matrices.values() for n, x in values.items() if not math.isfinite(x)}
    ranks = matrices.get("stable_rank", {})
    known = {name: rank for name, rank in ranks.items() if not math.isnan(rank)}
    return sorted(names, key=lambda name: (name not in broken, known.get(name, math.inf), name))


class Curves:
    """Chooses the matrices that have curves of their own: all, or the worst of very many.

    A curve that has begun is continued. It would have gaps otherwise, and in a long run every
    matrix is once among the worst.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def of(self, reading: HealthReading) -> HealthReading:
        """Return the reading with the chosen matrices only; ``scalars`` still cover all."""
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


# Columns of the heat map: more are narrower than its pixels.
MAX_READINGS = 512
# Of all readings together: some 25 MB as Python floats in dictionaries.
MAX_NUMBERS = 2**18


@dataclass(frozen=True, slots=True)
class _Kept:
    step: int
    matrices: Mapping[str, Mapping[str, float]]


class ThinnedReadings:
    """Readings of matrices in bounded memory: when they are too many, every second one is dropped.

    The first and the newest are always kept.
    """

    def __init__(self, *, max_readings: int = MAX_READINGS) -> None:
        self._max = max_readings
        self._kept: list[_Kept] = []
        self._newest: _Kept | None = None
        self._stride = 1
        self.num_seen = 0

    def add(self, reading: HealthReading) -> None:
        """Add a reading; one without a number of a matrix is ignored."""
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
        """The readings that are left, in order."""
        if self._newest is None or self._kept[-1] is self._newest:
            return list(self._kept)
        return [*self._kept, self._newest]

    def metrics(self) -> tuple[str, ...]:
        """Return all metrics of matrices, in the order in which they came."""
        return tuple(dict.fromkeys(name for kept in self.kept for name in kept.matrices))

    def rows(self, *, max_rows: int) -> tuple[tuple[int | str | float | None, ...], ...]:
        """Return rows (step, matrix, metrics …) of as many readings, evenly spread, as fit.

        The newest reading is always one of them. If it alone is too long, its worst matrices are.
        """
        readings, metrics = self.kept, self.metrics()
        sizes = [
            len({name for found in kept.matrices.values() for name in found}) for kept in readings
        ]
        stride = 1
        # From the end backwards: the newest stays.
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
