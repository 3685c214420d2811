"""From a judgement to a decision: act, hold still, skip the update, or stop."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Literal

from hf_pss.detection.explosion import ExplosionRule
from hf_pss.detection.judgement import Judgement, Verdict
from hf_pss.detection.state import JSON, check_version, read_integer, read_object

_VERSION = 1

# It acts on a state, not on an event, and its own rhythm spaces it out: were it to share the
# cooldown, a floor that acts at every check would silence the spike guard for the whole run.
_WITHOUT_COOLDOWN = frozenset({"stable_rank_floor"})


class Action(StrEnum):
    """What the controller is to do."""

    CONTINUE = "continue"
    """Nothing was noticed."""
    OBSERVE = "observe"
    """Something was noticed; report it and change nothing. The reason says why."""
    ACT = "act"
    """Smooth now."""
    UNDO = "undo"
    """Smoothing was tried and taken back; the reason says why."""
    SKIP_UPDATE = "skip_update"
    """Do not apply this update."""
    STOP = "stop"
    """End the run now: before this update, where the reading came before it."""
    ROLL_BACK = "roll_back"
    """Go back to the last healthy checkpoint, and on behind the batches that led here."""


@dataclass(frozen=True, slots=True)
class Decision:
    """An action and, for people and events, its reason."""

    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class History:
    """All that a policy remembers of a run."""

    last_intervention_step: int | None = None
    """Of the detectors that share the cooldown."""
    num_interventions: int = 0
    """Of all detectors; what the budget counts."""
    num_nonfinite_steps: int = 0
    last_nonfinite_step: int | None = None
    nonfinite_streak: int = 0
    """Length of the row of non-finite steps that ends at `last_nonfinite_step`."""

    def state_dict(self) -> dict[str, JSON]:
        """Return the history as plain JSON."""
        return {
            "version": _VERSION,
            "last_intervention_step": self.last_intervention_step,
            "num_interventions": self.num_interventions,
            "num_nonfinite_steps": self.num_nonfinite_steps,
            "last_nonfinite_step": self.last_nonfinite_step,
            "nonfinite_streak": self.nonfinite_streak,
        }

    @classmethod
    def from_state_dict(cls, state: object) -> History:
        """Return the history that was saved; `state` is parsed JSON, not trusted.

        Raises:
            StateError: truncated, damaged, or of another version.
        """
        what = "the history of interventions"
        check_version(state, _VERSION, what)
        fields = read_object(state, tuple(cls().state_dict()), what)

        def count(key: str) -> int:
            return read_integer(fields[key], what=f"{key!r} of {what}")

        def step(key: str) -> int | None:
            return None if fields[key] is None else count(key)

        return cls(
            last_intervention_step=step("last_intervention_step"),
            num_interventions=count("num_interventions"),
            num_nonfinite_steps=count("num_nonfinite_steps"),
            last_nonfinite_step=step("last_nonfinite_step"),
            nonfinite_streak=count("nonfinite_streak"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Decides about one judgement at a time; pure: the history goes in and comes out.

    All rules are ours; no source states any.

    >>> policy = Policy(
    ...     cooldown_steps=10, max_interventions=None, on_nonfinite="skip", max_nonfinite_streak=100
    ... )
    >>> spike = Judgement(Verdict.SPIKE, "grad_norm_ratio")
    >>> decision, history = policy.decide(spike, step=100, history=History())
    >>> decision.action.value
    'act'
    >>> policy.decide(spike, step=110, history=history)[0].reason
    'cooldown'
    """

    cooldown_steps: int
    """After an intervention at step s, none at s+1 … s+this; the stable-rank floor is exempt."""
    max_interventions: int | None
    """Budget of the whole run, over all detectors; None has no end, 0 only observes."""
    on_nonfinite: Literal["skip", "stop"]
    """Skip the update of a non-finite step, or stop before it."""
    max_nonfinite_streak: int
    """With "skip": stop at this many non-finite steps in a row, for such a run learns nothing."""

    def decide(
        self, judgement: Judgement, *, step: int, history: History, is_after_update: bool = False
    ) -> tuple[Decision, History]:
        """Return what to do about one judgement, and the history after it.

        Several judgements may come in one step, or none: a non-finite step counts once, and a
        streak is non-finite steps with consecutive numbers, whatever else is judged between them.
        A non-finite number that was read after the update leaves no update to skip.
        """
        if judgement.verdict is Verdict.NON_FINITE:
            history = _with_nonfinite(history, step)
            return self._decide_nonfinite(history, is_after_update), history
        if judgement.verdict is not Verdict.SPIKE:
            return Decision(Action.CONTINUE, judgement.verdict.value), history
        shares_cooldown = judgement.detector not in _WITHOUT_COOLDOWN
        if shares_cooldown and self._is_cooling_down(history, step):
            return Decision(Action.OBSERVE, "cooldown"), history
        if self.max_interventions is not None and history.num_interventions >= (
            self.max_interventions
        ):
            return Decision(Action.OBSERVE, "budget"), history
        history = replace(history, num_interventions=history.num_interventions + 1)
        if shares_cooldown:
            history = replace(history, last_intervention_step=step)
        return Decision(Action.ACT, judgement.detector), history

    def _is_cooling_down(self, history: History, step: int) -> bool:
        last = history.last_intervention_step
        return last is not None and step - last <= self.cooldown_steps

    def _decide_nonfinite(self, history: History, is_after_update: bool) -> Decision:
        if self.on_nonfinite == "stop":
            return Decision(Action.STOP, "non-finite step")
        if history.nonfinite_streak >= self.max_nonfinite_streak:
            return Decision(
                Action.STOP,
                f"{history.nonfinite_streak} non-finite steps in a row: nothing is learned any "
                "more. Resume from a healthy checkpoint, with a lower learning rate",
            )
        if is_after_update:
            return Decision(Action.OBSERVE, "after the update")
        return Decision(Action.SKIP_UPDATE, "non-finite step")


@dataclass(frozen=True, slots=True)
class Failure:
    """Interventions did not help."""

    onset_step: int
    """Of the first of them: the run was well before it."""
    step: int
    """At which that was found out."""
    reason: str
    loss_before: float | None = None
    loss: float | None = None


class FailureWatch:
    """Tells, step by step, when interventions have failed so often that smoothing is no answer.

    The rules are ours; no source states any. An intervention has failed

    - where another one that changes a weight follows within ``window_steps``, or
    - where at the end of the window the loss is not back: the median of the last 25 steps is more
      than 0.5 nats above that before the first intervention (the rise that `hf-pss sweep` calls an
      explosion). It fails once more with every further window in which it is not back.

    ``max_failed`` of these in a row are a failure; a window that ends well ends the row. The
    stable-rank floor's upkeep does not count. A resume begins anew.

    >>> watch = FailureWatch(window_steps=10, max_failed=2)
    >>> steps = [watch.see(s, loss=4.0, has_intervened=s in (5, 12, 19)) for s in range(1, 20)]
    >>> steps[-1].onset_step, steps[-1].reason
    (5, '2 interventions in a row failed since step 5')

    Args:
        window_steps: How long an intervention has to help.
        max_failed: So many failures in a row are reported.
    """

    _RULE = ExplosionRule()

    def __init__(self, *, window_steps: int, max_failed: int) -> None:
        self._window_steps, self._max_failed = window_steps, max_failed
        self._losses: deque[float] = deque(maxlen=self._RULE.smoothing_steps)
        self._level: float | None = None
        self._ends = self._num_failed = 0
        self.onset_step: int | None = None
        """Of the row of interventions that is under watch; None in a run that is well."""

    def see(
        self,
        step: int,
        *,
        loss: float | None,
        has_intervened: bool,
        has_changed_weights: bool = True,
    ) -> Failure | None:
        """Take a step's numbers, and return the failure that it completes.

        Args:
            step: Its number.
            loss: Its loss.
            has_intervened: Whether a spike or a drop was answered.
            has_changed_weights: Whether that changed a weight. Sound weights are left alone, and
                then more spikes say nothing about smoothing; the loss still does.
        """
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if has_intervened and self.onset_step is None:
            self.onset_step, self._num_failed = step, 0
            self._level = median([*self._losses][:-1]) if len(self._losses) > 1 else None
            self._ends = step + self._window_steps
        elif has_intervened and has_changed_weights:
            self._num_failed += 1
            self._ends = step + self._window_steps
        elif self.onset_step is not None and step >= self._ends:
            if self._is_back():
                self.onset_step = None
                return None
            self._num_failed += 1
            self._ends = step + self._window_steps
        if self.onset_step is None or self._num_failed < self._max_failed:
            return None
        failure = Failure(
            self.onset_step,
            step,
            f"{self._num_failed} interventions in a row failed since step {self.onset_step}",
            self._level,
            loss,
        )
        self.onset_step = None
        return failure

    def _is_back(self) -> bool:
        if self._level is None or not self._losses:
            return True  # nothing to compare with
        recent = [*self._losses][-self._window_steps :]
        return median(recent) <= self._level + self._RULE.rise_nats


def _with_nonfinite(history: History, step: int) -> History:
    if step == history.last_nonfinite_step:
        return history
    is_in_a_row = history.last_nonfinite_step == step - 1
    return replace(
        history,
        num_nonfinite_steps=history.num_nonfinite_steps + 1,
        nonfinite_streak=history.nonfinite_streak + 1 if is_in_a_row else 1,
        last_nonfinite_step=step,
    )
