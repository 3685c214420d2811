"""Trouble in the plain numbers of a run: spikes, explosions, and interventions that do not help.

Interventions are known by their steps alone, so nothing here depends on PSS.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import GLOBAL, Baseline, Quantity, RatioDetector, Verdict

# A rule about several steps must not become a rule about one row, which may be an accident.
_MIN_ROWS = 2
_MIN_CALIBRATION_ROWS = 3
# A spike is judged by this number of previous steps. A rise at the end of a log is judged by this
# number of last steps.
JUMP_STEPS = 5


@dataclass(frozen=True, slots=True)
class ExplosionRule:
    """The numbers of the definition; see `find_explosion` and `find_spikes`."""

    rise_nats: float = 0.5
    num_steps: int = 20
    plateau_nats: float = 0.1
    plateau_steps: int = 50
    smoothing_steps: int = 25

    def in_rows(self, interval: int) -> ExplosionRule:
        """Return the rule for a log that has one row every `interval` steps."""
        return replace(
            self,
            num_steps=max(_MIN_ROWS, math.ceil(self.num_steps / interval)),
            plateau_steps=max(2 * _MIN_ROWS, math.ceil(self.plateau_steps / interval)),
            smoothing_steps=max(1, round(self.smoothing_steps / interval)),
        )


_RULE = ExplosionRule()


@dataclass(frozen=True, slots=True)
class Explosion:
    """The kind of an explosion, and the step at which it began."""

    kind: Literal["non_finite", "rise", "plateau"]
    step: int
    """The step, counted from 1."""


def find_explosion(
    losses: Sequence[float | None], rule: ExplosionRule, *, unigram_entropy: float
) -> Explosion | None:
    """Return the first explosion in a curve of training losses, or None.

    - ``non_finite``: The loss is NaN, infinite or None for ``num_steps`` steps in a row, or at all
      steps up to the end. One skipped step is not an explosion.
    - ``rise``: The median loss of ``smoothing_steps`` steps stays at least ``rise_nats`` above its
      smallest previous value for ``num_steps`` steps in a row. This counts only after a descent to
      below the unigram entropy. The explosion begins at the first of these steps.
    - ``plateau``: Over the last ``plateau_steps`` steps the median loss is not below the unigram
      entropy less ``plateau_nats``. The model has then learned only the frequencies of tokens. The
      explosion begins at the first of these steps. It begins earlier if all medians of
      ``plateau_steps`` steps since an earlier step were not below that level.

    >>> rule = ExplosionRule(num_steps=3, smoothing_steps=1)
    >>> find_explosion([6.0, 4.0, 3.0, 5.0, 5.0, 5.0], rule, unigram_entropy=6.4)
    Explosion(kind='rise', step=4)
    """
    finite = [v if v is not None and math.isfinite(v) else None for v in losses]
    found = (_non_finite(finite, rule), _rise(finite, rule, unigram_entropy))
    first = min(filter(None, found), key=lambda explosion: explosion.step, default=None)
    return first or _plateau(finite, rule, unigram_entropy)


def find_rise_at_the_end(
    losses: Sequence[float | None], rule: ExplosionRule, *, num_rows: int
) -> int | None:
    """Return the index at which a rise begins that lasts to the end of the losses, or None.

    A run may be stopped soon after a rise. So fewer rows are required at the end of a log: at least
    `num_rows` losses, each ``rise_nats`` above the smallest previous median.
    """
    medians = list(running_medians(losses, rule.smoothing_steps))
    lowest = list(itertools.accumulate((math.inf if m is None else m for m in medians), min))
    begin = len(losses)
    while begin > 1 and (last := losses[begin - 1]) is not None:
        if last < lowest[begin - 2] + rule.rise_nats:
            break
        begin -= 1
    is_long = len(losses) - begin >= max(_MIN_ROWS, num_rows)
    return begin if is_long and begin > 0 else None


def find_spikes(
    losses: Sequence[float | None],
    grad_norms: Sequence[float | None],
    rule: ExplosionRule,
    *,
    num_rows: int,
) -> list[int]:
    """Return the indices at which the gradient norm or the loss spiked.

    The norm spikes by the rule of the default detector: it is more than τ times a moving average
    that does not learn from refused values. The loss spikes if it is at least ``rise_nats`` above
    the median of the previous `num_rows` losses.
    """
    config = PSSConfig()
    calibration = min(config.calibration_steps, max(_MIN_CALIBRATION_ROWS, len(losses) // 4))
    baseline = Baseline(config.baseline_alpha, calibration, config.patience_steps)
    norms = RatioDetector("norm", Quantity.GRAD_NORM, config.threshold_ratio, baseline)
    window: list[float] = []
    found = []
    for index, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True)):
        has_spiked = False
        if norm is not None and norm >= 0:  # false for NaN
            has_spiked = norms.judge({GLOBAL: norm}).verdict is Verdict.SPIKE
        if loss is not None:
            has_spiked |= bool(window) and loss >= median(window) + rule.rise_nats
            window = [*window, loss][-num_rows:]
        if has_spiked:
            found.append(index)
    return found


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
    lowest, streak, began = math.inf, 0, 0
    for step, level in enumerate(running_medians(losses, rule.smoothing_steps), start=1):
        if level is None:
            continue
        has_descended = lowest < unigram_entropy
        streak = streak + 1 if has_descended and level >= lowest + rule.rise_nats else 0
        began = step if streak == 1 else began  # there may be steps without a loss in between
        if streak == rule.num_steps:
            return Explosion("rise", began)
        lowest = min(lowest, level)
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
    """The step at which the trouble began. The run was healthy well before this step."""
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
      last 25 steps is more than 0.5 nats above the median before the first intervention (the
      rise of an `ExplosionRule`). The intervention fails once more with every further window
      that ends without recovery.

    ``max_failed`` of these in a row are a failure. A window that ends with recovery resets the
    count. Interventions that only maintain the stable-rank floor do not count. A resumed run starts
    with a count of zero.

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
        self._level: float | None = None
        self._window_end = self._num_failed = 0
        self.onset_step: int | None = None
        """The first intervention whose outcome is still open. None in a healthy run."""

    def update(
        self,
        step: int,
        *,
        loss: float | None,
        has_intervened: bool,
        has_changed_weights: bool = True,
    ) -> TrainingFailure | None:
        """Add the numbers of one step, and return the failure that they complete, if any.

        Args:
            step: The number of the step.
            loss: The loss of the step.
            has_intervened: Whether PSS responded to a spike or a drop in this step.
            has_changed_weights: Whether that response changed a weight. PSS leaves sound
                weights alone. In that case a second spike proves nothing about smoothing, but
                the loss still counts.
        """
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if has_intervened and self.onset_step is None:
            self.onset_step, self._num_failed = step, 0
            self._level = median([*self._losses][:-1]) if len(self._losses) > 1 else None
            self._window_end = step + self._window_steps
        elif self.onset_step is not None and (
            (has_intervened and has_changed_weights) or step >= self._window_end
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
            return True  # No earlier loss exists to compare with.
        recent = [*self._losses][-self._window_steps :]
        return median(recent) <= self._level + _RULE.rise_nats
