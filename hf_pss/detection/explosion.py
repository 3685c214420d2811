"""What counts as an explosion: one written definition, decided by a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Explosion", "ExplosionRule", "find_explosion"]


@dataclass(frozen=True, slots=True)
class ExplosionRule:
    """The numbers of the definition; see `find_explosion`."""

    rise_nats: float = 0.5
    num_steps: int = 20
    plateau_nats: float = 0.1
    plateau_steps: int = 50
    smoothing_steps: int = 25


@dataclass(frozen=True, slots=True)
class Explosion:
    """How and when a run exploded."""

    kind: Literal["non_finite", "rise", "plateau"]
    step: int
    """Counted from 1."""


def find_explosion(
    losses: Sequence[float | None], rule: ExplosionRule, *, unigram_entropy: float
) -> Explosion | None:
    """Return the first explosion in a curve of training losses, or None.

    - ``non_finite``: the loss is NaN, infinite or None for ``num_steps`` steps in a row, or at all
      steps up to the end. One skipped step is not an explosion.
    - ``rise``: the median loss of ``smoothing_steps`` steps stays at least ``rise_nats`` above the
      smallest such median before it, for ``num_steps`` steps in a row, after a descent to below the
      unigram entropy. The step is the first of these.
    - ``plateau``: over the last ``plateau_steps`` steps the median loss is not below the unigram
      entropy less ``plateau_nats``: the model knows the frequencies of tokens and nothing else.
      The step is the first of these, or an earlier one since which no median of ``plateau_steps``
      steps was below that.

    >>> rule = ExplosionRule(num_steps=3, smoothing_steps=1)
    >>> find_explosion([6.0, 4.0, 3.0, 5.0, 5.0, 5.0], rule, unigram_entropy=6.4)
    Explosion(kind='rise', step=4)
    """
    finite = [v if v is not None and math.isfinite(v) else None for v in losses]
    found = [_non_finite(finite, rule), _rise(finite, rule, unigram_entropy)]
    steps = [explosion for explosion in found if explosion is not None]
    if steps:
        return min(steps, key=lambda explosion: explosion.step)
    return _plateau(finite, rule, unigram_entropy)


def _non_finite(losses: Sequence[float | None], rule: ExplosionRule) -> Explosion | None:
    streak = 0
    for step, loss in enumerate(losses, start=1):
        streak = streak + 1 if loss is None else 0
        if streak == rule.num_steps or (streak and step == len(losses)):
            return Explosion("non_finite", step - streak + 1)
    return None


def _rise(
    losses: Sequence[float | None], rule: ExplosionRule, unigram_entropy: float
) -> Explosion | None:
    lowest, streak, began, window = math.inf, 0, 0, list[float]()
    for step, loss in enumerate(losses, start=1):
        if loss is None:
            continue
        window = [*window, loss][-rule.smoothing_steps :]
        median = _median(window)
        has_descended = lowest < unigram_entropy
        streak = streak + 1 if has_descended and median >= lowest + rule.rise_nats else 0
        began = step if streak == 1 else began  # steps without a loss may lie between
        if streak == rule.num_steps:
            return Explosion("rise", began)
        lowest = min(lowest, median)
    return None


def _plateau(
    losses: Sequence[float | None], rule: ExplosionRule, unigram_entropy: float
) -> Explosion | None:
    level = unigram_entropy - rule.plateau_nats
    last = [loss for loss in losses[-rule.plateau_steps :] if loss is not None]
    if len(losses) < rule.plateau_steps or not last or _median(last) < level:
        return None
    first = len(losses) - rule.plateau_steps
    while first > 0:
        window = [v for v in losses[first - 1 : first - 1 + rule.plateau_steps] if v is not None]
        if window and _median(window) < level:
            break
        first -= 1
    return Explosion("plateau", first + 1)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
