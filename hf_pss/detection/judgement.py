"""The types that detectors share with their callers: quantities, readings and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

Readings: TypeAlias = Mapping[str, float]
"""The readings of one quantity at one step, by matrix. A global quantity has one key, `GLOBAL`."""

GLOBAL = "global"


class Quantity(StrEnum):
    """A quantity that a detector can read."""

    GRAD_NORM = "grad_norm"
    MATRIX_GRAD_NORM = "matrix_grad_norm"
    UPDATE_NORM = "update_norm"
    STABLE_RANK = "stable_rank"
    SPECTRAL_NORM = "spectral_norm"


class Verdict(StrEnum):
    """The conclusion of a detector. The least severe one comes first."""

    CALIBRATING = "calibrating"
    NORMAL = "normal"
    SPIKE = "spike"
    NON_FINITE = "non_finite"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The conclusion of one detector about one set of readings.

    `value`, `baseline` and `threshold` belong to the worst reading, which is the one
    farthest over its threshold. While all names are still calibrating, they belong to the
    first name in sorted order.
    """

    verdict: Verdict
    detector: str
    fired: tuple[str, ...] = ()
    """The names that fired, the farthest over its threshold first, or those that are not finite."""
    value: float | None = None
    baseline: float | None = None
    """b_{t-1}, before this reading was learned. None without a baseline."""
    threshold: float | None = None
    """The number at which the reading would fire. None while nothing may fire."""
    new_level: tuple[str, ...] = ()
    """The names that fired for too long. Their baselines therefore restart at this value."""


_SEVERITY = {verdict: severity for severity, verdict in enumerate(Verdict)}


def worst(judgements: Sequence[Judgement]) -> Judgement:
    """Return the judgement with the most severe verdict. Among equals the first one counts.

    >>> calm = Judgement(Verdict.NORMAL, "a")
    >>> worst([calm, Judgement(Verdict.SPIKE, "b"), Judgement(Verdict.SPIKE, "c")]).detector
    'b'

    Raises:
        ValueError: `judgements` is empty.
    """
    return max(judgements, key=lambda judgement: _SEVERITY[judgement.verdict])
