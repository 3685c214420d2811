"""From a judgement to a decision: act, hold still, skip the update, or stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

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
    SKIP_UPDATE = "skip_update"
    """Do not apply this update."""
    STOP = "stop"
    """End the run now: before this update, where the reading came before it."""


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
