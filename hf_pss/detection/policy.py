"""The policy, which turns a judgement into a decision: act, wait, skip the update or stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.state import JSON, check_version, read_integer, read_object

_VERSION = 1

# The floor corrects a lasting state and has a separate interval. If it shared the cooldown, a floor
# that acts at every check would silence the spike detectors for the whole run.
_WITHOUT_COOLDOWN = frozenset({"stable_rank_floor"})


class Action(StrEnum):
    """The response to a judgement."""

    CONTINUE = "continue"
    """Nothing was noticed."""
    OBSERVE = "observe"
    """Report the judgement and change nothing. The reason explains why."""
    ACT = "act"
    """Smooth now."""
    UNDO = "undo"
    """Smoothing was tried and reversed. The reason explains why."""
    SKIP_UPDATE = "skip_update"
    """Do not apply this update."""
    STOP = "stop"
    """End the run now. If the reading came before the update, the update is not applied."""
    ROLL_BACK = "roll_back"
    """Return to the last healthy checkpoint, and skip the batches that led to this step."""


@dataclass(frozen=True, slots=True)
class Decision:
    """An action and its reason, for people and events."""

    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class InterventionHistory:
    """Everything that a policy must know about the past of a run."""

    last_intervention_step: int | None = None
    """The step of the last intervention by a detector that shares the cooldown."""
    num_interventions: int = 0
    """The number of interventions by all detectors, which the budget limits."""
    num_nonfinite_steps: int = 0
    last_nonfinite_step: int | None = None
    nonfinite_streak: int = 0
    """The number of consecutive non-finite steps that end at `last_nonfinite_step`."""

    def state_dict(self) -> dict[str, JSON]:
        """Return the history as plain JSON."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_state_dict(cls, state: object) -> InterventionHistory:
        """Return the history that was saved. `state` is parsed JSON and not trusted.

        Raises:
            StateError: The state is truncated, damaged or of a different version.
        """
        what = "the history of interventions"
        check_version(state, _VERSION, what)
        empty = cls().state_dict()
        fields = read_object(state, tuple(empty), what)
        del fields["version"]
        # A field that is None at first holds a step number. That step may not have happened yet.
        numbers: dict[str, Any] = {
            name: None
            if value is None and empty[name] is None
            else read_integer(value, what=f"{name!r} of {what}")
            for name, value in fields.items()
        }
        return cls(**numbers)

    def with_nonfinite(self, step: int) -> InterventionHistory:
        """Return the history with one more non-finite step. The same step counts only once."""
        if step == self.last_nonfinite_step:
            return self
        is_in_a_row = self.last_nonfinite_step == step - 1
        return replace(
            self,
            num_nonfinite_steps=self.num_nonfinite_steps + 1,
            nonfinite_streak=self.nonfinite_streak + 1 if is_in_a_row else 1,
            last_nonfinite_step=step,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Decides about one judgement at a time. It is pure: it takes a history and returns the next.

    All rules are ours, because no source states any.

    >>> policy = Policy(
    ...     cooldown_steps=10, max_interventions=None, on_nonfinite="skip", max_nonfinite_streak=100
    ... )
    >>> spike = Judgement(Verdict.SPIKE, "grad_norm_ratio")
    >>> decision, history = policy.decide(spike, step=100, history=InterventionHistory())
    >>> decision.action.value
    'act'
    >>> policy.decide(spike, step=110, history=history)[0].reason
    'cooldown'
    """

    cooldown_steps: int
    """After step s with an intervention, steps s+1 … s+this have none, except for the floor."""
    max_interventions: int | None
    """The budget of the whole run for all detectors. None means no limit, and 0 only observes."""
    on_nonfinite: Literal["skip", "stop"]
    """Whether to skip the update of a non-finite step, or to stop before it."""
    max_nonfinite_streak: int
    """With "skip", stop at this many non-finite steps in a row, because
    such a run learns nothing."""

    def decide(
        self,
        judgement: Judgement,
        *,
        step: int,
        history: InterventionHistory,
        is_after_update: bool = False,
    ) -> tuple[Decision, InterventionHistory]:
        """Return the decision about one judgement, and the history after it.

        A step may bring several judgements, or none. A non-finite step counts once. A streak
        consists of non-finite steps with consecutive numbers, whatever else is judged between them.
        If a non-finite number was read after the update, the update can no longer be skipped.
        """
        if judgement.verdict is Verdict.NON_FINITE:
            history = history.with_nonfinite(step)
            return self._decide_nonfinite(history, is_after_update), history
        if judgement.verdict is not Verdict.SPIKE:
            return Decision(Action.CONTINUE, judgement.verdict.value), history
        last, spent = history.last_intervention_step, history.num_interventions
        shares_cooldown = judgement.detector not in _WITHOUT_COOLDOWN
        if shares_cooldown and last is not None and step - last <= self.cooldown_steps:
            return Decision(Action.OBSERVE, "cooldown"), history
        if self.max_interventions is not None and spent >= self.max_interventions:
            return Decision(Action.OBSERVE, "budget"), history
        history = replace(
            history,
            num_interventions=spent + 1,
            last_intervention_step=step if shares_cooldown else last,
        )
        return Decision(Action.ACT, judgement.detector), history

    def _decide_nonfinite(self, history: InterventionHistory, is_after_update: bool) -> Decision:
        if self.on_nonfinite == "stop":
            return Decision(Action.STOP, "non-finite step")
        if history.nonfinite_streak >= self.max_nonfinite_streak:
            return Decision(
                Action.STOP,
                f"{history.nonfinite_streak} non-finite steps in a row: the run no longer learns "
                "anything. Resume from a healthy checkpoint, with a lower learning rate",
            )
        if is_after_update:
            return Decision(Action.OBSERVE, "after the update")
        return Decision(Action.SKIP_UPDATE, "non-finite step")
