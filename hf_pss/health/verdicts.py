"""Limits beyond which a matrix looks ill, their descriptions, and the order of the matrices.

Training lowers stable ranks and raises norms, so an absolute level means little. A matrix is
therefore compared with noise of its shape, with its siblings (the matrices of its kind in other
blocks), and with its state at the start. A low stable rank is the singularity that arXiv 2602.01308
warns of. The limits are ours. They rank matrices by urgency and prove nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

FindingKind: TypeAlias = Literal[
    "non_finite", "zero", "low_rank", "below_siblings", "large", "fell", "grew", "metric"
]

# These are shares of the stable rank of noise and of the siblings' median.
LOW_SHARE_OF_NOISE = 0.02
LOW_SHARE_OF_SIBLINGS = 0.25
LARGE_RATIO_TO_SIBLINGS = 4.0
# This is a share of the change that is usual among all matrices of the run.
FALL_SHARE = 0.5
GROWTH_RATIO = 4.0
# A median of fewer values is not reliable.
MIN_SIBLINGS = 4
# Below 2, σ₁² is more than half of ‖W‖_F². Noise of a small matrix has hardly more than 2.
_ONE_DIRECTION = 2.0
_MIN_NOISE = 4.0
_SMALLEST = 1e-300  # keeps quotients finite


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to look at a matrix."""

    kind: FindingKind
    text: str
    """The reason in words."""
    excess: float
    """The distance beyond the limit, as a natural logarithm. Damage has no
    degree, so it has inf."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """Medians over the matrices of one kind. They are NaN for fewer than `MIN_SIBLINGS` values."""

    count: int
    stable_rank: float
    sigma1: float


def urgency(
    findings: Collection[Finding], relative_rank: float, name: str
) -> tuple[int, float, float, str]:
    """Return a sort key. The worst matrix has the smallest key.

    Damage comes first, then the largest excess beyond a limit, then the lowest stable rank.

    Args:
        findings: The findings of the matrix.
        relative_rank: Its stable rank in any unit that all matrices share. NaN if it is unknown.
        name: Its name, which breaks ties.
    """
    level = min(({"non_finite": 0, "zero": 1}.get(one.kind, 2) for one in findings), default=3)
    worst = max((one.excess for one in findings), default=0.0)
    return (level, -worst, math.inf if math.isnan(relative_rank) else relative_rank, name)


def siblings_of(stable_ranks: Iterable[float], sigmas: Iterable[float]) -> Siblings:
    """Return the medians over the matrices of one kind, including the matrix itself."""
    ranks = _usable(stable_ranks)
    return Siblings(len(ranks), usual(ranks), usual(sigmas))


def usual(values: Iterable[float], *, default: float = math.nan) -> float:
    """Return the median of the positive finite values, or the default if there are too few."""
    found = _usable(values)
    return statistics.median(found) if len(found) >= MIN_SIBLINGS else default


def damaged(kind: Literal["non_finite", "zero"], text: str = "every number is 0") -> Finding:
    """Return the finding of a matrix that holds NaN, inf or only zeros."""
    return Finding(kind, text, math.inf)


def against_noise(rank: float, noise: float | None) -> Iterator[Finding]:
    """Compare a stable rank with the stable rank of noise.

    Args:
        rank: The stable rank of the matrix.
        noise: The stable rank of noise of its shape, or None if the shape is unknown.
    """
    limit = 0.0 if noise is None else LOW_SHARE_OF_NOISE * noise
    if rank < _ONE_DIRECTION and (noise is None or noise >= _MIN_NOISE):
        text = f"one direction holds {1 / max(rank, 1.0):.0%} of ‖W‖²: stable rank {rank:.3g}"
        text += f", noise {noise:.3g}" if noise is not None else ""
        yield Finding("low_rank", text, _excess(max(limit, _ONE_DIRECTION), rank))
    elif noise is not None and rank < limit:
        text = f"stable rank {rank:.3g}, {rank / noise:.1%} of noise of its shape ({noise:.3g})"
        yield Finding("low_rank", text, _excess(limit, rank))


def against_siblings(rank: float, sigma1: float, siblings: Siblings) -> Iterator[Finding]:
    """Compare stable rank and σ₁ with the siblings' medians."""
    limit = LOW_SHARE_OF_SIBLINGS * siblings.stable_rank
    if rank < limit:
        text = f"stable rank {rank:.3g}; its {siblings.count} siblings' median "
        yield Finding("below_siblings", f"{text}{siblings.stable_rank:.3g}", _excess(limit, rank))
    limit = LARGE_RATIO_TO_SIBLINGS * siblings.sigma1
    if sigma1 > limit:
        text = f"σ₁ {sigma1:.3g}; its {siblings.count} siblings' median {siblings.sigma1:.3g}"
        yield Finding("large", text, _excess(sigma1, limit))


def against_past(
    fall: float, growth: float, *, usual_fall: float, usual_growth: float
) -> Iterator[Finding]:
    """Compare the changes of a matrix since the start with the changes of all matrices.

    Args:
        fall: The current stable rank of the matrix over the one at the start. NaN if unknown.
        growth: The same ratio of σ₁.
        usual_fall: The median of `fall` over all matrices.
        usual_growth: The median of `growth` over all matrices.
    """
    limit = FALL_SHARE * usual_fall
    if fall < limit:
        text = f"stable rank fell to {fall:.0%}, others to {usual_fall:.0%}"
        yield Finding("fell", text, _excess(limit, fall))
    limit = GROWTH_RATIO * usual_growth
    if growth > limit:
        text = f"σ₁ grew {growth:.3g} ×, others {usual_growth:.3g} ×"
        yield Finding("grew", text, _excess(growth, limit))


def _excess(larger: float, smaller: float) -> float:
    return math.log(larger / max(smaller, _SMALLEST))


def _usable(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value) and value > 0]
