"""The learning rate after a checkpoint: whether it rises to what did the harm, and by how much.

A run that came to harm slowly, while its rate rose, would come to it again. The rule is ours: its
schedule is scaled, so that the rate rises no higher than where the checkpoint had it, but by no
less than a tenth, for the rate at the checkpoint itself is scaled with it. After a collapse the
floor alone did better than with a lower rate (docs/experiments.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import History

__all__ = ["Rise", "rise_after", "scale_against", "scale_to_hold"]

_LEAST_RISE = 1.1
_LEAST_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Rise:
    """A learning rate that rises by more than a tenth."""

    rate: float
    """At the checkpoint."""
    next: float
    """Of the first row after it."""
    begins: int
    """The step at which it had risen so far."""
    highest: float
    """Later on, as logged."""
    step: int
    """Where that was."""


def rise_after(history: History | None, step: int) -> Rise | None:
    """Return how the logged rate rose after a checkpoint; None where it did not."""
    rows = () if history is None else history.rows
    logged = [(row.step, row.learning_rate) for row in rows if row.learning_rate is not None]
    rates = [(at, rate) for at, rate in logged if math.isfinite(rate) and rate > 0]
    before = [rate for at, rate in rates if at <= step]
    later = [(rate, at) for at, rate in rates if at > step]
    limit = _LEAST_RISE * before[-1] if before else math.inf
    higher = [(rate, at) for rate, at in later if rate > limit]
    if not higher:
        return None
    highest, at = max(higher)
    return Rise(before[-1], later[0][0], higher[0][1], highest, at)


def scale_to_hold(rise: Rise | None, failure: Failure | None) -> float:
    """Return the factor that keeps a schedule from doing slow harm again; 1 where none is needed.

    A spike may have been a batch's doing, and a rise after the harm was noticed has not done it:
    there nothing is scaled.
    """
    if rise is None or failure is None or failure.kind != "slow_damage":
        return 1.0
    return scale_against(rise) if rise.begins <= failure.noticed_step else 1.0


def scale_against(rise: Rise) -> float:
    """Return the factor by which the rate rises no higher than at the checkpoint, 0.1 at least."""
    return max(_LEAST_SCALE, rise.rate / rise.highest)
