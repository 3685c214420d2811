"""The learning rate after a checkpoint: whether it rises to what did the harm, and by how much.

A run that came to harm slowly, while its rate rose, would come to it again. The rule is ours: it
goes on with its schedule scaled, so that the rate rises no higher than where the checkpoint had it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import History

__all__ = ["Rise", "rise_after", "scale_to_hold"]

_LEAST_RISE = 1.1


@dataclass(frozen=True, slots=True)
class Rise:
    """A learning rate that rises."""

    rate: float
    """At the checkpoint."""
    highest: float
    """Later on, as logged."""
    step: int
    """Where that was."""


def rise_after(history: History | None, step: int) -> Rise | None:
    """Return how the logged rate rose after a checkpoint; None where it did not, by a tenth."""
    rows = () if history is None else history.rows
    logged = [(row.step, row.learning_rate) for row in rows if row.learning_rate is not None]
    rates = [(at, rate) for at, rate in logged if math.isfinite(rate) and rate > 0]
    before = [rate for at, rate in rates if at <= step]
    later = [(rate, at) for at, rate in rates if at > step]
    if not before or not later or max(later)[0] <= _LEAST_RISE * before[-1]:
        return None
    highest, at = max(later)
    return Rise(before[-1], highest, at)


def scale_to_hold(rise: Rise | None, failure: Failure | None) -> float:
    """Return the factor that keeps a schedule from doing slow harm again; 1 where none is needed.

    A spike may have been a batch's doing: there the rise is told of, and nothing is scaled.
    """
    if rise is None or failure is None or failure.kind != "slow_damage":
        return 1.0
    return rise.rate / rise.highest
