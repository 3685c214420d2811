"""Recognise a run that interventions do not help, from plain losses and step numbers.

This module does not depend on PSS. It needs only the losses and the steps of interventions.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from hf_pss.detection.explosion import ExplosionRule

_RULE = ExplosionRule()


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
