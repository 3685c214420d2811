"""Limits beyond which a matrix looks ill, their descriptions, and the order of the matrices.

A matrix is compared with noise of its shape, with its siblings (the matrices of its kind in other
blocks), and with its state at the start. A low stable rank is the singularity that arXiv 2602.01308
warns of. The limits are ours. They rank matrices by urgency and prove nothing.

Training lowers stable ranks and raises norms by amounts that differ from block to block, so sound
models hold matrices far from noise and from their siblings. (SmolLM2-135M: the embedding has a
stable rank of 2.0, and σ₁ of the first block's k is 4.7 times the median.) Such a level is only a
remark. It becomes a finding only if bfloat16 addition would lose something. That happens when one
matrix is below `LOST_SHARE` times its siblings, or all other directions of a matrix are below
`LOST_SHARE` times the first. Changes since the start are findings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

FindingKind: TypeAlias = Literal[
    "non_finite",
    "zero",
    "vanished",
    "low_rank",
    "below_siblings",
    "large",
    "fell",
    "grew",
    "metric",
]

# The rounding unit of bfloat16. A summand below this share of the sum is lost in its rounding.
LOST_SHARE = 2.0**-8

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
    """The distance beyond the limit, as a natural logarithm; inf for damage."""
    is_remark: bool = False
    """Whether sound models hold matrices like this, too. A remark only shows where to look."""


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

    Damage comes first, then findings, then remarks, both with the largest excess beyond a limit
    first, then the lowest stable rank.

    Args:
        findings: The findings of the matrix.
        relative_rank: Its stable rank in any unit that all matrices share. NaN if it is unknown.
        name: Its name, which breaks ties.
    """
    damage = {"non_finite": 0, "zero": 1, "vanished": 1}
    level = min((damage.get(one.kind, 2 + one.is_remark) for one in findings), default=4)
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


def usual_of_kinds(sigmas: Iterable[Iterable[float]]) -> float:
    """Return the median over the kinds of their medians of σ₁, NaN for fewer than `MIN_SIBLINGS`.

    If a kind has vanished in most blocks, its own median has vanished, too, so only this median
    over all kinds can show it.
    """
    return usual(statistics.median(_usable(one) or [math.nan]) for one in sigmas)


def is_ill(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is more than a remark."""
    return not all(one.is_remark for one in findings)


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings and then the remarks, each with the largest excess first."""
    return tuple(sorted(findings, key=lambda one: (one.is_remark, -one.excess)))


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
    has_others = math.sqrt(max(rank - 1.0, 0.0)) >= LOST_SHARE  # ‖W − σ₁uvᵀ‖_F / σ₁
    if rank < _ONE_DIRECTION and (noise is None or noise >= _MIN_NOISE):
        text = f"one direction holds {1 / max(rank, 1.0):.0%} of ‖W‖²: stable rank {rank:.3g}"
        text += f", noise {noise:.3g}" if noise is not None else ""
        yield Finding("low_rank", text, _excess(max(limit, _ONE_DIRECTION), rank), has_others)
    elif noise is not None and rank < limit:
        text = f"stable rank {rank:.3g}, {rank / noise:.1%} of noise of its shape ({noise:.3g})"
        yield Finding("low_rank", text, _excess(limit, rank), is_remark=True)


def against_siblings(
    rank: float, sigma1: float, siblings: Siblings, *, usual_sigma1: float
) -> Iterator[Finding]:
    """Compare stable rank and σ₁ with the siblings' medians, and σ₁ with all kinds.

    Args:
        rank: The stable rank of the matrix.
        sigma1: Its largest singular value.
        siblings: The medians of its kind.
        usual_sigma1: The result of `usual_of_kinds`, or NaN if it does not apply.
    """
    kin = f"its {siblings.count} siblings' median"
    for whose, median in ((kin, siblings.sigma1), ("the median of all kinds", usual_sigma1)):
        if sigma1 < LOST_SHARE * median:
            text = f"σ₁ {sigma1:.3g} has vanished beside {whose} {median:.3g}"
            yield Finding("vanished", text, _excess(LOST_SHARE * median, sigma1))
            return
    limit = LOW_SHARE_OF_SIBLINGS * siblings.stable_rank
    if rank < limit:
        text = f"stable rank {rank:.3g}; {kin} {siblings.stable_rank:.3g}"
        yield Finding("below_siblings", text, _excess(limit, rank), is_remark=True)
    limit = LARGE_RATIO_TO_SIBLINGS * siblings.sigma1
    have_vanished = siblings.sigma1 < LOST_SHARE * usual_sigma1
    if sigma1 > limit and not have_vanished:
        text = f"σ₁ {sigma1:.3g}; {kin} {siblings.sigma1:.3g}"
        loses_none = siblings.sigma1 >= LOST_SHARE * sigma1
        yield Finding("large", text, _excess(sigma1, limit), loses_none)


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
