"""All text for people about an event: log lines, alerts for trackers, and errors with advice.

The choice of records that get a message is ours, and so is the advice.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hf_pss.detection.detectors import GLOBAL
from hf_pss.detection.policy import Action
from hf_pss.records.events import Event, EventKind, Intervention, Record

_MAX_NAMES = 3
# One or two spikes may come from their batches. The number is that of max_failed_interventions.
_MANY = 3
_BAD = (EventKind.SPIKE, EventKind.DROP, EventKind.NON_FINITE, EventKind.FAILURE)

_KIND = {
    EventKind.SPIKE: "spike",
    EventKind.DROP: "rank drop",
    EventKind.FLOOR: "rank floor",
    EventKind.NON_FINITE: "not finite",
    EventKind.RESUME: "resumed",
    EventKind.FAILURE: "smoothing failed",
    EventKind.ERROR: "an error",
}
_RESPONSE = {
    Action.ACT: "smoothed",
    Action.UNDO: "taken back",
    Action.OBSERVE: "observed",
    Action.SKIP_UPDATE: "update skipped",
    Action.STOP: "stopped",
    Action.ROLL_BACK: "rolled back",
}
_DONE = {
    Action.SKIP_UPDATE: "PSS skipped this step's update and changed no weight.",
    Action.STOP: "PSS stopped the run ({reason}).",
    Action.ROLL_BACK: "PSS returned to an earlier checkpoint: {reason}.",
}
_NOTHING_DONE = "PSS changed nothing ({reason})."

_ADVICE = {
    EventKind.SPIKE: (
        "Watch the loss over the next hundred steps. If spikes come back, lower the learning rate, "
        "lengthen its warmup, or look at this step's batches."
    ),
    EventKind.DROP: (
        "Look at the stable ranks of these matrices, and of their block, in the heat map. If they "
        "keep falling, lower the learning rate."
    ),
    EventKind.FLOOR: (
        "This is routine in a run from random weights. If the loss falls too slowly, lower the "
        "rate of the block matrices (pss_optim=adamw), or the floor (pss_floor_ratio)."
    ),
    EventKind.NON_FINITE: (
        "A single such step can come from its batch; several in a row come from the weights. Look "
        "at this step's batch, lower the learning rate, or resume from a checkpoint whose loss was "
        "finite."
    ),
    EventKind.RESUME: "Compare the loss of the next steps with the loss before the checkpoint.",
    EventKind.FAILURE: (
        "Smoothing does not solve the problem of this run. Lower the learning rate, and look at "
        "the batches before the first intervention."
    ),
    EventKind.ERROR: (
        "Training continued. Look at the log of this step. If a save failed, look at the disk's "
        "free space and your permissions."
    ),
}
_ADVICE_AFTER_STOP = (
    "The run has ended: resume from a checkpoint whose loss was finite, at a lower learning rate."
)
_ADVICE_NONFINITE_OBSERVED = (
    "Set observe_only=False to let PSS skip such an update, or stop, as on_nonfinite says."
)
_ADVICE_OBSERVED = {
    "observe only": "Set observe_only=False to let PSS smooth next time.",
    "cooldown": "If the loss does not recover, shorten cooldown_steps.",
    "budget": "max_interventions is used up: lower the learning rate, or raise that budget.",
}


def describe_event(event: Event) -> str:
    """Return a short description of an event, with its numbers and the first matrices."""
    name = event.detector.removesuffix("_ratio").replace("_", " ")
    if event.kind is EventKind.RESUME:
        return "resumed from a checkpoint, smoothing as requested"
    if _is_without_losses(event):
        return event.reason.partition(";")[0]
    if event.kind is EventKind.FAILURE:
        loss, before = _number(event.loss), _number(event.baseline)
        return f"interventions did not help, loss {loss:.3g} against {before:.3g} before"
    if event.kind is EventKind.ERROR:
        return f"an operation of PSS failed, {name}"
    if event.kind is EventKind.NON_FINITE:
        numbers = {f"{name} =": event.value, "loss": event.loss}
        shown = (f"{label} {x:.3g}" for label, x in numbers.items() if x is not None)
        return f"not finite ({', '.join(shown) or name}){_where(event)}"
    value, threshold = _number(event.value), _number(event.threshold)
    if event.kind is EventKind.FLOOR:
        return f"stable rank {value:.4g} below its floor of {threshold:.4g}{_where(event)}"
    if not event.baseline:
        return f"{name} {value:.3g} against a threshold of {threshold:.3g}{_where(event)}"
    return (
        f"{name} {value:.3g}, {value / event.baseline:.2g} × its average of {event.baseline:.3g} "
        f"(limit {threshold / event.baseline:.2g} ×){_where(event)}"
    )


def describe_intervention(record: Intervention) -> str:
    """Return one sentence about the effect of an intervention on the weights."""
    total = record.num_selected or len(record.matrices)
    effect = (
        f"smoothing ({record.smoothing}) changed {record.num_changed} of {total} "
        f"{'matrix' if total == 1 else 'matrices'} in {record.seconds:.2f} s"
    )
    if record.event.decision is Action.UNDO:
        effect += f", and it was taken back: {record.event.reason}"
    if record.loss_before is not None and record.loss_after is not None:
        effect += (
            f"; the loss of the trial's micro-batch went from {record.loss_before:.4g} to "
            f"{record.loss_after:.4g}"
        )
    if record.event.update_applied is False:
        effect += "; the update was skipped"
    return f"{effect}."


def intervention_line(record: Intervention) -> str:
    """Return one line for a terminal: the event and the intervention."""
    return (
        f"PSS, step {record.event.step}: {describe_event(record.event)}; "
        f"{describe_intervention(record)}"
    )


class InterventionLevels:
    """Chooses the level at which the interventions of one run are logged."""

    def __init__(self) -> None:
        self._floor_has_acted = False

    def of(self, record: Intervention) -> int:
        """Return WARNING for a spike or the first action of the floor, and INFO otherwise."""
        if not record.num_changed:
            return logging.INFO
        if record.event.kind is not EventKind.FLOOR:
            return logging.WARNING
        is_first, self._floor_has_acted = not self._floor_has_acted, True
        return logging.WARNING if is_first else logging.INFO


def card_section(options: str, events: Iterable[Event]) -> str:
    """Return a section of a model card in Markdown: the options, and a line for each kind of event.

    Args:
        options: The options in words.
        events: The events of the run, ordered by step.
    """
    steps: dict[str, list[int]] = {}
    for event in events:
        steps.setdefault(f"{_KIND[event.kind]}, {_response(event)}", []).append(event.step)
    lines = [
        f"- {what}: {len(at)} ×, between steps {at[0]} and {at[-1]}" for what, at in steps.items()
    ]
    return "\n".join(
        [
            "\n### Parametric Singularity Smoothing\n",
            f"This model was trained with hf_pss ({options}).",
            "Events of the run:\n" if lines else "It recorded no event.",
            *lines,
            "",
        ]
    )


class AlertLevel(StrEnum):
    """The importance of an alert. Every tracker has these three levels."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Alert:
    """A record in words."""

    step: int
    level: AlertLevel
    title: str
    """A title below 64 characters, which is the limit of W&B."""
    happened: str
    done: str
    advice: str

    @property
    def text(self) -> str:
        """The three sentences as one text."""
        return f"{self.happened} {self.done} {self.advice}"


def alert_of(record: Record) -> Alert:
    """Return the alert about a record.

    >>> from hf_pss.detection.detectors import Judgement, Verdict
    >>> from hf_pss.detection.policy import Decision
    >>> spike = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    >>> event = Event.of(spike, Decision(Action.OBSERVE, "cooldown"), step=90, loss=4.0)
    >>> alert_of(event).happened
    'Step 90: grad norm 9, 9 × its average of 1 (limit 2.5 ×).'
    """
    if isinstance(record, Intervention):
        event, done = record.event, f"PSS: {describe_intervention(record)}"
    else:
        event = record
        done = _DONE.get(event.decision, _NOTHING_DONE).format(reason=event.reason)
    kind = "training failed" if _is_without_losses(event) else _KIND[event.kind]
    return Alert(
        step=event.step,
        level=_level(event),
        title=f"PSS, step {event.step}: {kind}, {_response(event)}",
        happened=f"Step {event.step}: {describe_event(event)}.",
        done=done,
        advice=_advice(event),
    )


def overall_advice(records: Sequence[Record], run_dir: str) -> str:
    """Return the advice of the worst of some records, of equally bad ones the newest.

    Args:
        records: At least one record, sorted by step.
        run_dir: The folder of the run. If spikes come back, the advice names the command that
            examines it.
    """
    alerts = [alert_of(record) for record in records]
    levels = list(AlertLevel)
    worst = max(reversed(alerts), key=lambda alert: levels.index(alert.level))
    events = (one.event if isinstance(one, Intervention) else one for one in records)
    num_bad = sum(event.kind in _BAD for event in events)
    when = "" if worst is alerts[-1] else f"Step {worst.step}: "
    more = (
        f" {num_bad} of the last {len(records)} events are spikes, drops, failures or steps that "
        "were not finite. To see what went wrong and where you can continue, call hf-pss rescue "
        f"{run_dir}."
    )
    return f"{when}{worst.advice}{more if num_bad >= _MANY else ''}"


class Alerts:
    """Reports every rare record as an alert, and frequent records less and less often.

    Every intervention on a spike or a drop, every failure and every stop becomes an alert. Other
    records may come at every check. These are the floor's routine interventions, events that were
    only observed, and non-finite steps. They become an alert for the first three of a kind, then
    for the 10th, the 100th, and so on.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[EventKind, Action]] = Counter()

    def of(self, record: Record) -> Alert | None:
        """Return the alert about a record, or None after many records of the same kind."""
        event = record.event if isinstance(record, Intervention) else record
        self._counts[event.kind, event.decision] += 1
        is_rare = (
            event.decision in (Action.STOP, Action.ROLL_BACK)
            or event.kind is EventKind.FAILURE
            or (
                isinstance(record, Intervention)
                and event.kind is not EventKind.FLOOR
                and record.num_changed > 0
            )
        )
        is_due = is_rare or is_worth_a_line(self._counts[event.kind, event.decision])
        return alert_of(record) if is_due else None


def is_worth_a_line(count: int) -> bool:
    """Return whether the count-th repetition is reported: 1, 2, 3, 10, 100 and so on.

    >>> [n for n in range(1, 200) if is_worth_a_line(n)]
    [1, 2, 3, 10, 100]
    """
    return count <= 3 or count == 10 ** round(math.log10(count))


def describe_nonfinite(
    event: Event, num_nonfinite_steps: int, *, has_overflown: bool, is_discarded: bool = False
) -> str:
    """Return the log line about a non-finite step: the number, the place, and the response."""
    if has_overflown:
        response = "left to the loss scaler"
    elif is_discarded and event.decision is not Action.STOP:
        response = "its update was discarded by DeepSpeed, no weight was touched"
    elif event.decision is Action.OBSERVE:
        response = f"observed ({event.reason})"
    elif event.decision is Action.SKIP_UPDATE:
        response = "the update was skipped"
    else:
        response = event.decision.value.replace("_", " ")
    return (
        f"Step {event.step} is not finite ({_numbers(event)}){_first_in(event)}: {response}. "
        f"Non-finite steps so far: {num_nonfinite_steps}.{_hint_at_labels(event)}"
    )


def name_on_ranks(name: str | None, ranks: Sequence[int]) -> str:
    """Return the name of a tensor with the ranks that it is broken on.

    Args:
        name: The name that this rank found, or None if its own tensors are sound.
        ranks: The ranks with a broken tensor, at least one.

    >>> name_on_ranks("lm_head.weight", [1])
    'lm_head.weight of rank 1'
    >>> name_on_ranks(None, [0, 2, 3, 5])
    'a tensor of ranks 0, 2, 3 and 1 more'
    """
    more = f" and {len(ranks) - _MAX_NAMES} more" if len(ranks) > _MAX_NAMES else ""
    listed = ", ".join(map(str, ranks[:_MAX_NAMES]))
    return f"{name or 'a tensor'} of rank{'s' if len(ranks) > 1 else ''} {listed}{more}"


def describe_stop(event: Event, *, is_after_update: bool, is_damaged: bool = False) -> str:
    """Return the text of the error that ends a run: the event, the damage, and a remedy.

    Args:
        event: The event, with the decision to stop.
        is_after_update: Whether the update of this step was applied.
        is_damaged: Whether a weight is known to be broken. It always is after the update.
    """
    if is_after_update or is_damaged:
        remedy = (
            "The weights are damaged: resume from an earlier checkpoint, at a lower learning rate."
        )
    elif event.loss is not None and not math.isfinite(event.loss):
        remedy = (
            "No weight was touched in this step, but its loss is not finite either. Its batch is "
            "broken, or an earlier update has ruined the weights. Look at the batch, or resume "
            "from a checkpoint whose loss was finite, at a lower learning rate."
        )
    else:
        remedy = (
            "No weight was touched: look at this step's batch, lower the learning rate, or set "
            "on_nonfinite='skip' to skip such steps."
        )
    moment = "after" if is_after_update else "before"
    return (
        f"Stopped {moment} the update of step {event.step}: {_numbers(event)}{_first_in(event)} "
        f"({event.reason}). {remedy}{_hint_at_labels(event)}"
    )


def _response(event: Event) -> str:
    return _RESPONSE.get(event.decision, "noted")


def _level(event: Event) -> AlertLevel:
    if event.decision is Action.STOP or event.kind is EventKind.FAILURE:
        return AlertLevel.ERROR
    is_routine = event.kind in (EventKind.FLOOR, EventKind.RESUME)
    return AlertLevel.INFO if is_routine else AlertLevel.WARN


def _advice(event: Event) -> str:
    if event.decision is Action.STOP:
        return _ADVICE_AFTER_STOP
    if event.decision is Action.OBSERVE and event.reason in _ADVICE_OBSERVED:
        is_nonfinite = event.kind is EventKind.NON_FINITE
        return _ADVICE_NONFINITE_OBSERVED if is_nonfinite else _ADVICE_OBSERVED[event.reason]
    return _ADVICE[EventKind.NON_FINITE if _is_without_losses(event) else event.kind]


def _is_without_losses(event: Event) -> bool:
    """Return whether a run failed without an intervention: it stopped, or its state was broken."""
    is_failure = event.kind is EventKind.FAILURE
    return is_failure and event.loss is None and event.baseline is None


def _where(event: Event) -> str:
    if event.fired in ((), (GLOBAL,)):
        return ""
    num_hidden = len(event.fired) - _MAX_NAMES
    more = f" and {num_hidden} more" if num_hidden > 0 else ""
    return f" in {', '.join(event.fired[:_MAX_NAMES])}{more}"


def _first_in(event: Event) -> str:
    where = _where(event)
    return f", first{where}" if where else ""


def _numbers(event: Event) -> str:
    of_loss = "" if event.detector == "loss" else f", loss = {event.loss}"
    return f"{event.detector} = {event.value}{of_loss}"


def _hint_at_labels(event: Event) -> str:
    """Name the usual cause of a NaN loss beside a finite gradient: a mean over no labels, 0/0."""
    if event.detector != "loss":
        return ""
    return " The gradient is finite, so the batch may have no label that counts (all are -100)."


def _number(value: float | None) -> float:
    return math.nan if value is None else value
