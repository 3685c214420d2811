"""Which matrices are told by name where a model has more of them than a dashboard holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from hf_pss.health.reading import HealthReading
from hf_pss.integration.reporters.reporter import NONFINITE_SPECTRA, num_broken

__all__ = ["Curves", "worst_first"]

logger = logging.getLogger(__name__)

# Of one metric [ours]. A dense model of 70B has 560 matrices, one of experts may have 20,000.
MAX_CURVES = 1024
# Of a metric with more: half of these places at once, the others as matrices come among the worst.
NUM_PLACES, NUM_NEWCOMERS = 128, 8

_Value = TypeVar("_Value")


def worst_first(matrices: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the names of all metrics: what is not finite first, then by the lowest stable rank.

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

    A curve that has begun goes on: it would be full of holes otherwise, and over a long run every
    matrix is among the worst once.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def of(self, reading: HealthReading) -> HealthReading:
        """Return the reading without the matrices that are not told; ``scalars`` are of all."""
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
            matrices={metric: self._told(values) for metric, values in reading.matrices.items()},
            spectra=self._told(reading.spectra),
        )

    def _admit(self, worst: list[str], num_matrices: int) -> None:
        if not self._names:
            self._names = dict.fromkeys(worst[: NUM_PLACES // 2])
            logger.warning(
                "This model has %d matrices: trackers get curves of %d of them, the worst ones, "
                "and of all only the scalars. The files beside the checkpoints have everything.",
                num_matrices,
                NUM_PLACES,
            )
            return
        for name in worst[:NUM_NEWCOMERS]:
            if len(self._names) < NUM_PLACES:
                self._names[name] = None

    def _told(self, values: Mapping[str, _Value]) -> Mapping[str, _Value]:
        if len(values) <= MAX_CURVES:
            return values
        return {name: values[name] for name in self._names if name in values}
