"""The words between detectors and the rest: what is measured, what is concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

Readings: TypeAlias = Mapping[str, float]
"""One quantity at one step: name of a matrix -> number; a global quantity has one key, `GLOBAL`."""

GLOBAL = "global"


class Quantity(StrEnum):
    """What a detector reads."""

    GRAD_NORM = "grad_norm"
    MATRIX_GRAD_NORM = "matrix_grad_norm"
    UPDATE_NORM = "update_norm"
    STABLE_RANK = "stable_rank"
    SPECTRAL_NORM = "spectral_norm"


class Verdict(StrEnum):
    """What a detector concludes, the least grave first."""

    CALIBRATING = "calibrating"
    NORMAL = "normal"
    SPIKE = "spike"
    NON_FINITE = "non_finite"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one detector says about one set of readings.

    `value`, `baseline` and `threshold` are those of the worst reading, the one farthest over its
    threshold; while everything is still calibrating, those of the first name in sorted order.
    """

    verdict: Verdict
    detector: str
    fired: tuple[str, ...] = ()
    """Names that fired, the farthest over its threshold first; or those that are not finite."""
    value: float | None = None
    baseline: float | None = None
    """b_{t-1}, before this reading was learned; None without one."""
    threshold: float | None = None
    """The number at which the reading would fire; None while nothing may fire."""
    new_level: tuple[str, ...] = ()
    """Names whose baseline gave up after firing for too long and now starts anew at this value."""


_GRAVITY = {verdict: gravity for gravity, verdict in enumerate(Verdict)}


def worst(judgements: Sequence[Judgement]) -> Judgement:
    """Return the judgement with the gravest verdict; among equals, the first.

    >>> calm = Judgement(Verdict.NORMAL, "a")
    >>> worst([calm, Judgement(Verdict.SPIKE, "b"), Judgement(Verdict.SPIKE, "c")]).detector
    'b'

    Raises:
        ValueError: `judgements` is empty.
    """
    return max(judgements, key=lambda judgement: _GRAVITY[judgement.verdict])
