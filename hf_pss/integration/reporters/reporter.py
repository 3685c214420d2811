"""The seam: what a tracker can be told, and the names under which it is told."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hf_pss.advice import Alert
from hf_pss.health.reading import HealthReading

__all__ = [
    "NONFINITE_SPECTRA",
    "Histogram",
    "Image",
    "Reporter",
    "Snapshot",
    "histogram_of",
    "label_of",
    "num_broken",
    "scalars_of",
]

Image: TypeAlias = npt.NDArray[np.uint8]
"""(height, width, 3), RGB."""

NUM_BINS = 64
NONFINITE_SPECTRA = "nonfinite_spectra"

_PART = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges: W&B's, trackio's and TensorBoard's common ground."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    """One more than counts, ascending."""
    values: npt.NDArray[np.float64]
    """What was counted; finite."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run so far: one table, and one picture where it could be drawn."""

    step: int
    columns: tuple[str, ...]
    rows: tuple[tuple[int | str | float | None, ...], ...]
    """(step, matrix, metrics …); None where a step did not measure the metric."""
    heat_map: Image | None


class Reporter(ABC):
    """One tracker. Methods may raise: `Reporters` turns that into one warning."""

    name: str
    """As in ``report_to``."""
    max_rows: int
    """What the tracker's table holds and still opens."""

    @abstractmethod
    def report(self, reading: HealthReading) -> None:
        """Log a reading's numbers, and histograms of its spectra."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Raise an alert."""

    @abstractmethod
    def snapshot(self, snapshot: Snapshot) -> None:
        """Log table and heat map: each time under the same names, the newest is the run's."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to close
        """Nothing comes after this; the tracker's run belongs to the Trainer and stays open."""


def label_of(matrix: str) -> str:
    """Write a matrix's name so that every tracker takes it for a tag, and no folder.

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
        # A histogram cannot show NaN, and a panel that stays empty says nothing.
        yield f"pss/{NONFINITE_SPECTRA}", num_broken(reading.spectra)


def histogram_of(values: tuple[float, ...]) -> Histogram | None:
    """Count singular values between 0 and σ₁; None where none is finite.

    NaN and inf are left out, for no tracker's histogram takes them: `scalars_of` counts such
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
