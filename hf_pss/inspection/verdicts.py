"""Which matrices look ill, and why: the worst first.

Absolute levels mean little, for training lowers stable ranks by itself; so a matrix is compared
with noise of its shape and with its siblings, the matrices of its kind and shape in other blocks.
What is compared is of arXiv 2602.01308 (a low stable rank is the singularity it fears); the four
limits below are ours. They rank what to look at first, and prove nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hf_pss.inspection.measure import MatrixHealth

__all__ = ["Finding", "FindingKind", "JudgedMatrix", "judge"]

FindingKind: TypeAlias = Literal["non_finite", "zero", "low_rank", "below_siblings", "large"]

# Shares of the noise's stable rank, and of the siblings' median.
LOW_SHARE_OF_NOISE = 0.02
LOW_SHARE_OF_SIBLINGS = 0.25
LARGE_RATIO_TO_SIBLINGS = 4.0
# A median of fewer says nothing.
MIN_SIBLINGS = 4
# Below 2, σ₁² is more than half of ‖W‖_F²; a matrix whose noise has hardly more is just small.
_ONE_DIRECTION = 2.0
_MIN_NOISE = 4.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to look at a matrix."""

    kind: FindingKind
    text: str
    """For people."""
    excess: float
    """How far beyond its limit, as a natural logarithm; inf where there is no degree."""


@dataclass(frozen=True, slots=True)
class JudgedMatrix:
    """A matrix, and what speaks against it."""

    health: MatrixHealth
    findings: tuple[Finding, ...]
    """The worst first; empty where nothing does."""

    @property
    def rank(self) -> tuple[int, float, float, str]:
        """The smaller, the worse: a key to sort by."""
        health = self.health
        share = health.stable_rank / health.noise
        order = math.inf if math.isnan(share) else share
        if not self.findings:
            return (3, 0.0, order, health.name)
        worst = self.findings[0]
        level = {"non_finite": 0, "zero": 1}.get(worst.kind, 2)
        return (level, -worst.excess, order, health.name)


def judge(matrices: Iterable[MatrixHealth]) -> tuple[JudgedMatrix, ...]:
    """Return all matrices with their findings, the worst first; cost: none worth naming."""
    held = list(matrices)
    families: defaultdict[tuple[str, str, tuple[int, int]], list[MatrixHealth]] = defaultdict(list)
    for health in held:
        families[health.place.stack, health.place.kind, health.shape].append(health)
    judged = []
    for family in families.values():
        siblings = _siblings(family)
        judged += [JudgedMatrix(health, _findings(health, siblings)) for health in family]
    return tuple(sorted(judged, key=lambda one: one.rank))


@dataclass(frozen=True, slots=True)
class _Siblings:
    """What a matrix is compared with; taken once a family, for experts have tens of thousands."""

    count: int
    stable_rank: float
    """The median, as `sigma1`."""
    sigma1: float


def _siblings(family: Sequence[MatrixHealth]) -> _Siblings | None:
    sound = [one for one in family if one.frobenius > 0]  # false for NaN
    if len(sound) < MIN_SIBLINGS:
        return None
    return _Siblings(
        len(sound),
        statistics.median(one.stable_rank for one in sound),
        statistics.median(one.sigma1 for one in sound),
    )


def _findings(health: MatrixHealth, siblings: _Siblings | None) -> tuple[Finding, ...]:
    if health.num_nonfinite:
        m, n = health.shape
        text = f"{health.num_nonfinite:,} of {m * n:,} numbers are NaN or inf"
        return (Finding("non_finite", text, math.inf),)
    if health.frobenius == 0:
        return (Finding("zero", "every number is 0", math.inf),)
    found = [*_against_noise(health)]
    if siblings is not None:
        found += _against_siblings(health, siblings)
    return tuple(sorted(found, key=lambda finding: -finding.excess))


def _against_noise(health: MatrixHealth) -> Iterable[Finding]:
    rank, noise = health.stable_rank, health.noise
    limit = LOW_SHARE_OF_NOISE * noise
    if noise >= _MIN_NOISE and rank < _ONE_DIRECTION:
        share = 1 / max(rank, 1.0)
        text = f"one direction holds {share:.0%} of ‖W‖²: stable rank {rank:.3g}, noise {noise:.3g}"
        yield Finding("low_rank", text, math.log(max(limit, _ONE_DIRECTION) / rank))
    elif rank < limit:
        text = f"stable rank {rank:.3g}, {rank / noise:.1%} of noise of its shape ({noise:.3g})"
        yield Finding("low_rank", text, math.log(limit / rank))


def _against_siblings(health: MatrixHealth, siblings: _Siblings) -> Iterable[Finding]:
    rank, sigma1 = siblings.stable_rank, siblings.sigma1
    limit = LOW_SHARE_OF_SIBLINGS * rank
    if health.stable_rank < limit:
        text = f"stable rank {health.stable_rank:.3g}; its {siblings.count} siblings' median "
        text += f"{rank:.3g}"
        yield Finding("below_siblings", text, math.log(limit / health.stable_rank))
    limit = LARGE_RATIO_TO_SIBLINGS * sigma1
    if health.sigma1 > limit:
        text = f"σ₁ {health.sigma1:.3g}; its {siblings.count} siblings' median {sigma1:.3g}"
        yield Finding("large", text, math.log(health.sigma1 / limit))
