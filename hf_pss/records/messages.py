"""What to make of a record: in plain words what happened, what PSS did, and what to look at.

The words go to trackers as alerts and to the terminal. Which records are worth one, and what each
advises, is ours.

What is said of a non-finite step: the line in the log, and the error that ends a run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from hf_pss.detection import GLOBAL
from hf_pss.detection.policy import Action
from hf_pss.records.events import Event, EventKind, Intervention, Record

__all__ = [
    "Alert",
    "AlertLevel",
    "Alerts",
    "alert_of",
    "describe",
    "describe_nonfinite",
    "describe_stop",
    "is_worth_a_line",
]

_MOST_NAMES = 3


class AlertLevel(StrEnum):
    """How much it matters; every tracker knows these three."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Alert:
    """A record in words."""

    step: int
    level: AlertLevel
    title: str
    """Below 64 characters, W&B's limit."""
    happened: str
    done: str
    advice: str

    @property
    def text(self) -> str:
        """The three sentences in one."""
        return f"{self.happened} {self.done} {self.advice}"


class Alerts:
    """Thins what comes often, so that what is rare is read.

    Every intervention on a spike or a drop, every failure and every stop is told; of what may come
    at every check (the floor's upkeep, events that were only observed, non-finite steps) the first
    three of a kind, then the 10th, the 100th, and so on.
    """

    def __init__(self) -> None:
        self._seen: Counter[tuple[EventKind, Action]] = Counter()

    def of(self, record: Record) -> Alert | None:
        """Return the alert of a record, or None where it has been told often enough."""
        event = _event_of(record)
        key = (event.kind, event.decision)
        self._seen[key] += 1
        is_rare = (
            event.decision in (Action.STOP, Action.ROLL_BACK)
            or event.kind is EventKind.FAILURE
            or (
                isinstance(record, Intervention)
                and event.kind is not EventKind.FLOOR
                and record.num_changed > 0
            )
        )
        return alert_of(record) if is_rare or is_worth_a_line(self._seen[key]) else None


def alert_of(record: Record) -> Alert:
    """Put a record into words.

    >>> from hf_pss.detection.judgement import Judgement, Verdict
    >>> from hf_pss.detection.policy import Decision
    >>> spike = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    >>> event = Event.of(spike, Decision(Action.OBSERVE, "cooldown"), step=90, loss=4.0)
    >>> alert_of(event).happened
    'Step 90: grad norm 9, 9 × its average of 1 (limit 2.5 ×).'
    """
    event = _event_of(record)
    return Alert(
        step=event.step,
        level=_level(record),
        title=f"PSS, step {event.step}: {_kind(event)}, {_answer(record)}",
        happened=f"Step {event.step}: {_happened(event)}.",
        done=_done(record),
        advice=_advice(event),
    )


_KIND = {
    EventKind.SPIKE: "spike",
    EventKind.DROP: "rank drop",
    EventKind.FLOOR: "rank floor",
    EventKind.NON_FINITE: "not finite",
    EventKind.RESUME: "resumed",
    EventKind.FAILURE: "smoothing failed",
    EventKind.ERROR: "an error",
}

_ADVICE = {
    EventKind.SPIKE: (
        "Watch the loss over the next hundred steps. If spikes come back, lower the learning rate, "
        "lengthen its warmup, or look at this step's batches."
    ),
    EventKind.DROP: (
        "Look at the stable ranks of the matrices named here, and of their block, in the heat map. "
        "If they go on falling, lower the learning rate."
    ),
    EventKind.FLOOR: (
        "Upkeep, nothing to do by itself. If the same matrices come back at every check, lower "
        "their learning rate, or the floor."
    ),
    EventKind.NON_FINITE: (
        "One alone may be a batch; several in a row are the weights. Look at this step's batch, "
        "lower the learning rate, or go back to a checkpoint whose loss was finite."
    ),
    EventKind.RESUME: "Compare the loss of the next steps with the one before the checkpoint.",
    EventKind.FAILURE: (
        "Smoothing is no answer to what goes wrong here: lower the learning rate, and look at the "
        "batches before the first intervention."
    ),
    EventKind.ERROR: (
        "Training went on. Look at the log of this step; of a save, at the disk's space and rights."
    ),
}
_STOPPED = "The run has ended: resume from a checkpoint whose loss was finite, more slowly."
_OBSERVED_NONFINITE = (
    "Set observe_only=False to let PSS skip such an update, or stop, as on_nonfinite says."
)
_OBSERVED = {
    "observe only": "Set observe_only=False to let PSS smooth next time.",
    "cooldown": "If the loss does not recover, shorten cooldown_steps.",
    "budget": "max_interventions is used up: lower the learning rate, or raise that budget.",
}


def _event_of(record: Record) -> Event:
    return record.event if isinstance(record, Intervention) else record


def _level(record: Record) -> AlertLevel:
    event = _event_of(record)
    if event.decision is Action.STOP or event.kind is EventKind.FAILURE:
        return AlertLevel.ERROR
    if event.kind in (EventKind.FLOOR, EventKind.RESUME):
        return AlertLevel.INFO
    return AlertLevel.WARN


def _kind(event: Event) -> str:
    return "training failed" if _is_without_losses(event) else _KIND[event.kind]


def _is_without_losses(event: Event) -> bool:
    """Tell a failure that no intervention came before: a stop, or a state that was not finite."""
    is_failure = event.kind is EventKind.FAILURE
    return is_failure and event.loss is None and event.baseline is None


def _happened(event: Event) -> str:
    name = event.detector.removesuffix("_ratio").replace("_", " ")
    if event.kind is EventKind.RESUME:
        return "resumed from a checkpoint, smoothing as asked for"
    if _is_without_losses(event):
        return event.reason.partition(";")[0]
    if event.kind is EventKind.FAILURE:
        loss, before = _number(event.loss), _number(event.baseline)
        return f"interventions did not help, loss {loss:.3g} against {before:.3g} before"
    if event.kind is EventKind.ERROR:
        return f"something of PSS's own failed, {name}"
    if event.kind is EventKind.NON_FINITE:
        numbers = {f"{name} =": event.value, "loss": event.loss}
        told = (f"{what} {x:.3g}" for what, x in numbers.items() if x is not None)
        return f"not finite ({', '.join(told) or name}){_where(event)}"
    value, baseline, threshold = _number(event.value), event.baseline, _number(event.threshold)
    if event.kind is EventKind.FLOOR:
        return f"stable rank {value:.3g} below its floor of {threshold:.3g}{_where(event)}"
    if not baseline:
        return f"{name} {value:.3g} against a threshold of {threshold:.3g}{_where(event)}"
    return (
        f"{name} {value:.3g}, {value / baseline:.2g} × its average of {baseline:.3g} "
        f"(limit {threshold / baseline:.2g} ×){_where(event)}"
    )


def _where(event: Event) -> str:
    if event.fired in ((), (GLOBAL,)):
        return ""
    hidden = len(event.fired) - _MOST_NAMES
    more = f" and {hidden} more" if hidden > 0 else ""
    return f" in {', '.join(event.fired[:_MOST_NAMES])}{more}"


def _answer(record: Record) -> str:
    if isinstance(record, Intervention):
        return "taken back" if record.event.decision is Action.UNDO else "smoothed"
    return {
        Action.OBSERVE: "observed",
        Action.SKIP_UPDATE: "update skipped",
        Action.STOP: "stopped",
        Action.ROLL_BACK: "rolled back",
    }.get(record.decision, "noted")


def _done(record: Record) -> str:
    if isinstance(record, Intervention):
        return f"PSS: {describe_answer(record)}"
    return {
        Action.OBSERVE: f"PSS changed nothing ({record.reason}).",
        Action.SKIP_UPDATE: "PSS skipped this step's update; no weight was touched.",
        Action.STOP: f"PSS stopped the run ({record.reason}).",
        Action.ROLL_BACK: f"PSS went back: {record.reason}.",
    }.get(record.decision, f"PSS changed nothing ({record.reason}).")


def describe_answer(record: Intervention) -> str:
    """Say in one sentence what an intervention did to the weights."""
    changed = record.num_changed
    took = f"in {record.seconds:.2f} s"
    if not changed:
        return f"{record.smoothing} left all {len(record.matrices)} matrices as they were, {took}."
    told = f"{record.smoothing} smoothed {changed} of {len(record.matrices)} matrices {took}"
    losses = ""
    if record.loss_before is not None and record.loss_after is not None:
        losses = f"; the loss went from {record.loss_before:.4g} to {record.loss_after:.4g}"
    if record.event.decision is Action.UNDO:
        return f"{told}, and it was taken back: {record.event.reason}{losses}."
    return f"{told}{losses}."


def _advice(event: Event) -> str:
    if event.decision is Action.STOP:
        return _STOPPED
    if event.decision is Action.OBSERVE and event.reason in _OBSERVED:
        is_nonfinite = event.kind is EventKind.NON_FINITE
        return _OBSERVED_NONFINITE if is_nonfinite else _OBSERVED[event.reason]
    if _is_without_losses(event):
        return _ADVICE[EventKind.NON_FINITE]
    return _ADVICE[event.kind]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def describe_nonfinite(
    event: Event, num_nonfinite_steps: int, *, has_overflown: bool, is_discarded: bool = False
) -> str:
    """Return the line for the log: what was not finite, where, and what became of the step."""
    if has_overflown:
        answer = "left to the loss scaler"
    elif is_discarded and event.decision is not Action.STOP:
        answer = "its update was discarded by DeepSpeed, no weight was touched"
    elif event.decision is Action.OBSERVE:
        answer = f"observed ({event.reason})"
    else:
        answer = event.decision.value.replace("_", " ")
    return (
        f"Step {event.step} is not finite ({event.detector} = {event.value}, loss {event.loss})"
        f"{_in_matrix(event)}: {answer}. Non-finite steps so far: {num_nonfinite_steps}."
    )


def describe_stop(event: Event, *, is_after_update: bool) -> str:
    """Return the error's text: what happened when, whether weights were touched, what to do."""
    moment = "after" if is_after_update else "before"
    return (
        f"Stopped {moment} the update of step {event.step}: {event.detector} = {event.value}, "
        f"loss = {event.loss}{_in_matrix(event)} ({event.reason}). "
        f"{_remedy(event, is_after_update=is_after_update)}"
    )


def _remedy(event: Event, *, is_after_update: bool) -> str:
    if is_after_update:
        return (
            "The weights are damaged: resume from an earlier checkpoint, at a lower learning rate."
        )
    if event.loss is not None and not math.isfinite(event.loss):
        return (
            "No weight was touched in this step, but its loss is not finite either: its batch is "
            "broken, or an earlier update has ruined the weights. Look at the batch, or resume "
            "from a checkpoint whose loss was finite, at a lower learning rate."
        )
    return (
        "No weight was touched: look at this step's batch, lower the learning rate, or set "
        "on_nonfinite='skip' to pass over such steps."
    )


def is_worth_a_line(streak: int) -> bool:
    """Tell whether the n-th non-finite step in a row is said: 1, 2, 3, 10, 100 and so on.

    >>> [n for n in range(1, 200) if is_worth_a_line(n)]
    [1, 2, 3, 10, 100]
    """
    return streak <= 3 or streak == 10 ** round(math.log10(streak))


def _in_matrix(event: Event) -> str:
    return f", first in {', '.join(event.fired)}" if event.fired not in ((), (GLOBAL,)) else ""


def describe(intervention: Intervention) -> str:
    """Return one line for people: what was noticed, and what was done."""
    return (
        f"PSS, step {intervention.event.step}: {_noticed(intervention.event)}; "
        f"{describe_answer(intervention)}"
    )


def _noticed(event: Event) -> str:
    if event.kind is EventKind.RESUME:
        return "resumed from a checkpoint, smoothing as asked for"
    value, baseline, threshold = event.value or 0.0, event.baseline, event.threshold or 0.0
    if event.kind is EventKind.FLOOR:
        return f"stable rank {value:.3g} below its floor of {threshold:.3g}"
    name = event.detector.removesuffix("_ratio").replace("_", " ")
    if not baseline:
        return f"{name} {value:.3g} against a threshold of {threshold:.3g}"
    return (
        f"{name} {value:.3g}, {value / baseline:.2g} × its average of {baseline:.3g} "
        f"(limit {threshold / baseline:.2g} ×)"
    )
