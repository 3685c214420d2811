"""Find spikes, explosions and failed interventions in the plain numbers of a run.

This module knows interventions only by their steps, so nothing here needs a PSS controller or
model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import GLOBAL, Baseline, Quantity, RatioDetector, Verdict

# A rule about several steps must not become a rule about a single row, which may be an outlier.
_MIN_ROWS = 2
_MIN_CALIBRATION_ROWS = 3
# A median of this number of losses reacts early, and one outlier does not change it.
FEW_ROWS = 3
# The scatter of the losses is measured over this number of rows.
_SCATTER_ROWS = 50
# With fewer differences than the first number, the scatter is not used, and the limit of a rise is
# twice the lowest median. With fewer than the second number, every row updates the limit. After
# that, only a new lowest median updates it.
_FEWEST_DIFFERENCES = 2
_MIN_DIFFERENCES = 10
# Two constants for independent normal noise of standard deviation 1: the inverse of the median
# absolute second difference (1.4826 / √6), and √n times the standard deviation of a median of n
# values.
_SIGMA_OF_DIFFERENCES = 0.6053
_SIGMA_OF_MEDIAN = 1.2533


@dataclass(frozen=True, slots=True)
class ExplosionRule:
    """The numbers of the definition; see `find_explosion`.

    Except for `plateau_nats`, no number has the unit of the loss. If no unigram entropy is given, a
    loss that is multiplied by a constant therefore gets the same verdict. We chose the factors on
    the labelled logs in tests/rescue.
    """

    num_steps: int = 20
    smoothing_steps: int = 25
    plateau_steps: int = 50
    plateau_nats: float = 0.1
    """Used only for losses in nats whose unigram entropy is known."""
    share_of_level: float = 0.125
    share_of_descent: float = 0.2
    num_scatters: float = 5.0

    def in_rows(self, interval: int) -> ExplosionRule:
        """Return the rule for a log that has one row every `interval` steps."""
        return replace(
            self,
            num_steps=max(_MIN_ROWS, math.ceil(self.num_steps / interval)),
            plateau_steps=max(2 * _MIN_ROWS, math.ceil(self.plateau_steps / interval)),
            smoothing_steps=max(1, round(self.smoothing_steps / interval)),
        )

    def rise(self, level: float, scatter: float, *, descent: float = 0.0) -> float:
        """Return the smallest rise of a running median that is neither noise nor negligible.

        It is the largest of three numbers:

        - ``share_of_level`` of the level,
        - ``num_scatters`` times the scatter of a median of ``smoothing_steps`` losses,
        - ``share_of_descent`` of the descent or ``num_scatters`` times the scatter of one loss,
          whichever is smaller.

        Args:
            level: The lowest running median.
            scatter: The standard deviation of one loss around its trend.
            descent: The difference between the highest previous running median and that level.
        """
        of_one = self.num_scatters * scatter
        of_medians = of_one
        if self.smoothing_steps > 1:
            of_medians *= _SIGMA_OF_MEDIAN / math.sqrt(self.smoothing_steps)
        relative = self.share_of_level * abs(level)
        return max(relative, of_medians, min(self.share_of_descent * descent, of_one))


_RULE = ExplosionRule()


@dataclass(frozen=True, slots=True)
class Explosion:
    """The kind of an explosion, and the step at which it began."""

    kind: Literal["non_finite", "rise", "plateau"]
    step: int
    """The step, counted from 1."""


def find_explosion(
    losses: Sequence[float | None], rule: ExplosionRule, *, unigram_entropy: float = math.inf
) -> Explosion | None:
    """Return the first explosion in a curve of training losses, or None.

    - ``non_finite``: The loss is NaN, infinite or None for ``num_steps`` steps in a row, or at all
      steps up to the end. One skipped step is not an explosion.
    - ``rise``: The median loss of ``smoothing_steps`` steps stays above its smallest previous value
      by at least `ExplosionRule.rise` for ``num_steps`` steps in a row. If the unigram entropy is
      known, this counts only after a descent to below it. The explosion begins at the first of
      these steps.
    - ``plateau``: The median loss of the last ``plateau_steps`` steps is at or above a level, which
      is the unigram entropy minus ``plateau_nats``. The model has then learned only the frequencies
      of tokens. The explosion begins at the first of these steps. If every window of
      ``plateau_steps`` steps since some earlier step also had a median at or above that level, the
      explosion begins at that earlier step.

    Args:
        losses: The loss of each step, in any unit. None and NaN stand for a step without a finite
            loss.
        rule: The numbers of the definition.
        unigram_entropy: The unigram entropy of the training text in nats. Give inf if it is unknown
            or if the loss is not a mean over tokens in nats. The function then finds no plateau.

    >>> rule = ExplosionRule(num_steps=3, smoothing_steps=1)
    >>> find_explosion([*range(20, 2, -1), 8.0, 8.0, 8.0], rule)
    Explosion(kind='rise', step=19)
    """
    finite = [v if v is not None and math.isfinite(v) else None for v in losses]
    found = (_non_finite(finite, rule), _rise(finite, rule, unigram_entropy))
    first = min(filter(None, found), key=lambda explosion: explosion.step, default=None)
    return first or _plateau(finite, rule, unigram_entropy)


def find_rise_at_the_end(
    losses: Sequence[float | None], rule: ExplosionRule, *, num_rows: int
) -> int | None:
    """Return the index at which a rise begins that lasts to the end of the losses, or None.

    A run may be stopped soon after a rise, so a rise at the end of a log may have fewer rows. It
    needs at least `num_rows` losses, each of which is above the smallest previous median by more
    than `ExplosionRule.rise`.
    """
    levels = list(running_levels(losses, rule))
    begin = len(losses)
    while begin > 1 and (last := losses[begin - 1]) is not None:
        if last <= levels[begin - 1].limit:
            break
        begin -= 1
    is_long = len(losses) - begin >= max(_MIN_ROWS, num_rows)
    return begin if is_long and begin > 0 else None


def find_norm_spikes(grad_norms: Sequence[float | None]) -> list[int]:
    """Return the indices at which the gradient norm spiked, by the rule of the default detector.

    A norm counts as a spike if it exceeds τ times a moving average that excludes spikes.
    """
    config = PSSConfig()
    calibration = min(config.calibration_steps, max(_MIN_CALIBRATION_ROWS, len(grad_norms) // 4))
    baseline = Baseline(config.baseline_alpha, calibration, config.patience_steps)
    norms = RatioDetector("norm", Quantity.GRAD_NORM, config.threshold_ratio, baseline)
    return [
        index
        for index, norm in enumerate(grad_norms)
        if norm is not None
        and norm >= 0  # false for NaN
        and norms.judge({GLOBAL: norm}).verdict is Verdict.SPIKE
    ]


class Scatter:
    """The standard deviation of one loss around its trend, measured over the last losses.

    It is the median absolute second difference, scaled so that it equals the standard deviation of
    independent normal noise. A linear trend and rare outliers hardly change it. If the median
    difference is 0, the mean difference is used instead.
    """

    def __init__(self) -> None:
        self._differences: deque[float] = deque(maxlen=_SCATTER_ROWS)
        self._last: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Return the number of second differences that the scatter is computed from."""
        return len(self._differences)

    def add(self, loss: float) -> None:
        """Add the next finite loss."""
        if len(self._last) == 2:
            before, last = self._last
            self._differences.append(abs((loss - last) - (last - before)))
        self._last = (*self._last[-1:], loss)

    @property
    def value(self) -> float:
        """The standard deviation in the unit of the loss, or 0 before the third loss."""
        if not self._differences:
            return 0.0
        return _SIGMA_OF_DIFFERENCES * (median(self._differences) or fmean(self._differences))


@dataclass(frozen=True, slots=True)
class Level:
    """The running median of the losses at one row, and the numbers that it is compared with."""

    median: float | None
    """The median of the last losses, or None for a row without a finite loss."""
    lowest: float
    """The smallest previous median, or inf."""
    limit: float
    """The loss has risen if the median is above this limit, which may be inf."""


def running_levels(losses: Sequence[float | None], rule: ExplosionRule) -> Iterator[Level]:
    """Yield the level of each row. The cost per row is O(``smoothing_steps``)."""
    lowest, highest, limit, scatter = math.inf, -math.inf, math.inf, Scatter()
    num_losses, largest = 0, 0.0
    for loss, level in zip(losses, running_medians(losses, rule.smoothing_steps), strict=True):
        yield Level(level, lowest, limit)
        if loss is None or level is None:
            continue
        num_losses += 1
        if num_losses == 1 or loss <= 2 * abs(largest):
            largest = loss if num_losses == 1 else max(largest, loss)
            scatter.add(loss)
        if num_losses < min(FEW_ROWS, rule.smoothing_steps):
            continue  # an outlier among the first losses must not become the lowest median
        highest = max(highest, level)
        is_new = level < lowest
        lowest = min(lowest, level)
        if len(scatter) < _FEWEST_DIFFERENCES:
            limit = 2 * lowest if lowest > 0 else math.inf
        elif is_new or len(scatter) < _MIN_DIFFERENCES:
            limit = lowest + rule.rise(lowest, scatter.value, descent=highest - lowest)


def running_medians(losses: Iterable[float | None], width: int) -> Iterator[float | None]:
    """Yield the median of the last `width` losses at each loss, and None at each None."""
    window: list[float] = []
    for loss in losses:
        if loss is not None:
            window = [*window, loss][-width:]
        yield None if loss is None else median(window)


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
    streak = began = 0
    for step, level in enumerate(running_levels(losses, rule), start=1):
        if level.median is None:
            continue
        has_descended = level.lowest < unigram_entropy
        streak = streak + 1 if has_descended and level.median > level.limit else 0
        began = step if streak == 1 else began  # the streak may contain steps without a loss
        if streak == rule.num_steps:
            return Explosion("rise", began)
    return None


def _plateau(
    losses: Sequence[float | None], rule: ExplosionRule, unigram_entropy: float
) -> Explosion | None:
    level = unigram_entropy - rule.plateau_nats
    last = [loss for loss in losses[-rule.plateau_steps :] if loss is not None]
    if len(losses) < rule.plateau_steps or not last or median(last) < level:
        return None
    first = len(losses) - rule.plateau_steps
    while first > 0:
        window = [v for v in losses[first - 1 : first - 1 + rule.plateau_steps] if v is not None]
        if window and median(window) < level:
            break
        first -= 1
    return Explosion("plateau", first + 1)


@dataclass(frozen=True, slots=True)
class TrainingFailure:
    """Interventions that did not help, or a different reason why a run cannot continue."""

    onset_step: int
    """The step at which the problem began. Well before this step, the run was healthy."""
    step: int
    """The step at which the failure was found."""
    reason: str
    loss_before: float | None = None
    loss: float | None = None


class FailedInterventions:
    """Counts interventions in a row that have failed, and reports when there are too many.

    The rules are ours. An intervention fails in two cases:

    - A second intervention that changes a weight follows within ``window_steps``.
    - The loss has not recovered at the end of that window. This means that the median of the
      last 25 steps is above the median before the first intervention by more than
      `ExplosionRule.rise`, which does not depend on the unit of the loss. Each further window
      that ends without recovery counts as one more failed intervention.

    ``max_failed`` failed interventions in a row are a failure. A window that ends with recovery
    resets the count. Interventions that only maintain the stable-rank floor do not count. A resumed
    run starts with a count of zero.

    >>> failed = FailedInterventions(window_steps=10, max_failed=2)
    >>> found = [failed.update(s, loss=4.0, has_intervened=s in (5, 12, 19)) for s in range(1, 20)]
    >>> found[-1].onset_step, found[-1].reason
    (5, '2 interventions in a row failed since step 5')

    Args:
        window_steps: The number of steps within which an intervention must help.
        max_failed: The number of failed interventions in a row that is reported as a failure.
    """

    def __init__(self, *, window_steps: int, max_failed: int) -> None:
        self._window_steps, self._max_failed = window_steps, max_failed
        self._losses: deque[float] = deque(maxlen=_RULE.smoothing_steps)
        self._scatter = Scatter()
        self._level: float | None = None
        self._limit = math.inf
        self._window_end = self._num_failed = 0
        self.onset_step: int | None = None
        """The step of the first intervention whose outcome is still open. None in a healthy run."""

    def update(
        self,
        step: int,
        *,
        loss: float | None,
        has_intervened: bool,
        has_changed_weights: bool = True,
    ) -> TrainingFailure | None:
        """Add the numbers of one step, and return a failure if one is found at this step.

        Args:
            step: The number of the step.
            loss: The loss of the step.
            has_intervened: Whether PSS responded to a spike or a drop in this step.
            has_changed_weights: Whether that response changed a weight. PSS does not change
                sound weights. In that case, a second spike does not show that smoothing failed,
                but the loss still counts.
        """
        is_first = has_intervened and self.onset_step is None
        if is_first:
            self.onset_step, self._num_failed = step, 0
            self._level = median(self._losses) if self._losses else None
            if self._level is not None:
                self._limit = self._level + _RULE.rise(self._level, self._scatter.value)
            self._window_end = step + self._window_steps
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
            self._scatter.add(loss)
        if (
            not is_first
            and self.onset_step is not None
            and ((has_intervened and has_changed_weights) or step >= self._window_end)
        ):
            if not (has_intervened and has_changed_weights) and self._has_recovered():
                self.onset_step = None
                return None
            self._num_failed += 1
            self._window_end = step + self._window_steps
        if self.onset_step is None or self._num_failed < self._max_failed:
            return None
        failure = TrainingFailure(
            self.onset_step,
            step,
            f"{self._num_failed} interventions in a row failed since step {self.onset_step}",
            self._level,
            loss,
        )
        self.onset_step = None
        return failure

    def _has_recovered(self) -> bool:
        if self._level is None or not self._losses:
            return True  # there is no earlier loss to compare with
        recent = [*self._losses][-self._window_steps :]
        return median(recent) <= self._limit
