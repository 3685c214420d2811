"""Steps, events and interventions as plain numbers, and records of them as lines of strict JSON.

A number that is NaN or infinite is written as null. The key ``non_finite`` of the record then holds
its value: ``{"value": null, "non_finite": {"value": "inf"}}``. So every line is strict JSON, other
programs read null, and `from_json_line` still restores the record exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeAlias

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision, InterventionHistory
from hf_pss.detection.state import (
    JSON,
    check_version,
    read_bool,
    read_integer,
    read_list,
    read_mapping,
    read_number,
    read_object,
    read_text,
)
from hf_pss.errors import StateError

VERSION = 1


class EventKind(StrEnum):
    """The kind of an event."""

    SPIKE = "spike"
    DROP = "drop"
    FLOOR = "floor"
    NON_FINITE = "non_finite"
    RESUME = "resume"
    FAILURE = "failure"
    """Interventions did not help. The decision describes how the run ended or continued."""
    ERROR = "error"
    """An operation of PSS failed, such as a decomposition or a save. Training continued."""


_KINDS = {
    "stable_rank_drop": EventKind.DROP,
    "stable_rank_floor": EventKind.FLOOR,
    "resume": EventKind.RESUME,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A detector fired, a number was not finite, or PSS itself had a problem."""

    step: int
    kind: EventKind
    detector: str
    value: float | None = None
    """The worst reading."""
    baseline: float | None = None
    threshold: float | None = None
    fired: tuple[str, ...] = ()
    """The names of the readings that fired, the farthest over its threshold first."""
    new_level: tuple[str, ...] = ()
    """The names that fired for too long. Their baselines therefore restart at this level."""
    loss: float | None = None
    update_applied: bool | None = None
    """Whether the optimizer's update of this step was applied. None in older files, and in records
    that belong to no update."""
    decision: Action
    reason: str

    @classmethod
    def of(
        cls, judgement: Judgement, decision: Decision, *, step: int, loss: float | None
    ) -> Event:
        """Return the event of a judgement of SPIKE or NON_FINITE and the decision about it."""
        if judgement.verdict is Verdict.NON_FINITE:
            kind = EventKind.NON_FINITE
        else:
            kind = _KINDS.get(judgement.detector, EventKind.SPIKE)
        values = asdict(judgement)
        del values["verdict"]
        values |= {"decision": decision.action, "reason": decision.reason}
        return cls(step=step, kind=kind, loss=loss, **values)


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """The effect of an intervention on one matrix, or the reason why there was none."""

    name: str
    shape: tuple[int, ...]
    status: str
    rank: int | None = None
    """k, the number of dominant singular values."""
    sigma_before: float | None = None
    """σ₁."""
    sigma_after: float | None = None
    stable_rank_before: float | None = None
    stable_rank_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """An event to which PSS responded by smoothing."""

    event: Event
    smoothing: str
    seconds: float
    loss_before: float | None = None
    """The loss of a micro-batch just before the edit. None if the edit was not tried."""
    loss_after: float | None = None
    """The loss of the same micro-batch just after it. The event's decision says if it was kept."""
    num_selected: int | None = None
    """How many matrices PSS watches, smoothed or not. None in older files."""
    matrices: tuple[MatrixChange, ...]

    @property
    def num_changed(self) -> int:
        """The number of matrices that were changed, for good or until the edit was undone."""
        return sum(change.status in ("smoothed", "truncated") for change in self.matrices)

    @property
    def has_changed_weights(self) -> bool:
        """Whether at least one matrix differs from before."""
        return self.num_changed > 0 and self.event.decision is not Action.UNDO


Record: TypeAlias = Event | Intervention


@dataclass(frozen=True, slots=True)
class HealthReading:
    """The health metrics of one step. A number that is NaN or inf marks a broken matrix."""

    step: int
    """The number of optimizer steps so far."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """One number for the whole model by the name of a metric, or by metric and summary:
    ``stable_rank/min``."""
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each metric by name, one number for each matrix by name."""
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values by the name of the matrix, descending, at the steps that sample them."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """The verdict of PSS on one step, and its actions."""

    step: int
    verdict: Verdict
    update_applied: bool
    records: tuple[Record, ...]
    """Events and interventions, in the order in which they happened."""
    scalars: Mapping[str, float]
    """Finite numbers for the log. Numbers that are not finite or not yet defined are left out."""
    is_in_trouble: bool
    """Whether this step spiked or was not finite. A stable rank below its floor does not count."""
    stable_ranks: Mapping[str, float] | None
    """The stable rank of every matrix, every ``health_every_steps``. None with ``health``."""
    health: HealthReading | None = None
    """The metrics that ``health`` asks for. They describe the weights before smoothing."""


@dataclass(slots=True)
class Step:
    """The current step, from before its update until its report."""

    number: int
    loss: float | None = None
    grad_norm_preclip: float | None = None
    update_applied: bool = True
    is_discarded: bool = False
    """Whether a different library dropped the update before this step was judged."""
    last_intervention_step: int | None = None
    """The step of the last intervention, before this step, of detectors that share the cooldown."""
    is_after_update: bool = False
    judgements: list[Judgement] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    to_smooth: list[tuple[Event, Judgement]] = field(default_factory=list)
    """The events to which PSS responds by smoothing when the update is done, in this order."""

    @property
    def is_in_trouble(self) -> bool:
        """See `StepReport`."""
        return any(
            judgement.verdict is Verdict.NON_FINITE
            or (judgement.verdict is Verdict.SPIKE and judgement.detector != "stable_rank_floor")
            for judgement in self.judgements
        )

    def settled(self, event: Event) -> Event:
        """Return an event of this step that states whether the update was applied."""
        return replace(event, update_applied=self.update_applied)

    @property
    def settled_records(self) -> tuple[Record, ...]:
        """The records so far. The events of interventions are settled already."""
        return tuple(self.settled(one) if isinstance(one, Event) else one for one in self.records)

    def is_due(self, every_steps: int) -> bool:
        """Return whether something with this interval is due now. 0 means never."""
        return every_steps > 0 and self.number % every_steps == 0

    def report(
        self,
        history: InterventionHistory,
        *,
        seconds: float,
        stable_ranks: Mapping[str, float] | None,
        health: HealthReading | None = None,
        health_seconds: float | None = None,
    ) -> StepReport:
        """Return the report of this step, given the policy's history at its end."""
        numbers: dict[str, float | None] = {
            "grad_norm_preclip": self.grad_norm_preclip,
            "interventions": history.num_interventions,
            "nonfinite_steps": history.num_nonfinite_steps,
            "seconds": seconds,
            "health_seconds": health_seconds,
        }
        for judgement in self.judgements:
            if judgement.detector == "grad_norm_ratio":
                numbers |= {"baseline": judgement.baseline, "threshold": judgement.threshold}
        verdicts = (judgement.verdict for judgement in self.judgements)
        return StepReport(
            step=self.number,
            verdict=max(verdicts, key=list(Verdict).index, default=Verdict.NORMAL),
            update_applied=self.update_applied,
            records=self.settled_records,
            scalars={
                name: float(number)
                for name, number in numbers.items()
                if number is not None and math.isfinite(number)
            },
            is_in_trouble=self.is_in_trouble,
            stable_ranks=stable_ranks,
            health=health,
        )


def to_json_line(record: Record) -> str:
    """Return the record as one line of strict JSON, without a line break.

    >>> spike = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    >>> event = Event.of(spike, Decision(Action.OBSERVE, "cooldown"), step=90, loss=math.inf)
    >>> json.loads(to_json_line(event))["loss"] is None  # strict JSON has no infinity
    True
    >>> from_json_line(to_json_line(event)) == event
    True
    """
    values = asdict(record)
    if isinstance(record, Intervention):
        event = values.pop("event")
        values["matrices"] = [_encode(change) for change in values["matrices"]]
        values = {**event, "kind": "intervention", "trigger": event["kind"], **values}
    return json.dumps({"version": VERSION, **_encode(values)}, allow_nan=False)


def from_json_line(line: str) -> Record:
    """Return the record of a line that `to_json_line` wrote.

    Raises:
        StateError: The line is malformed, of a different version, or of an unknown kind.
    """
    try:
        parsed = json.loads(line)  # accepts a bare NaN, which the readers of all fields reject
        check_version(parsed, VERSION, "an event")
        return _decode(dict(parsed))
    except (ValueError, RecursionError) as error:
        start = line[:80] + ("…" if len(line) > 80 else "")
        raise StateError(
            f"You gave a line that is not an event of hf_pss: {start!r}. {error}"
        ) from error


def _encode(values: dict[str, Any]) -> dict[str, JSON]:
    """Replace numbers that are not finite by null, and list them in ``non_finite``."""
    non_finite: dict[str, JSON] = {
        name: str(value)
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    encoded: dict[str, JSON] = {n: None if n in non_finite else v for n, v in values.items()}
    return {**encoded, "non_finite": non_finite} if non_finite else encoded


def _decode(parsed: dict[str, object]) -> Record:
    del parsed["version"]
    # These fields are not in the files of the first version.
    parsed.setdefault("update_applied", None)
    if parsed.get("kind") != "intervention":
        return Event(**_decode_values(_types(Event), parsed, "event"))
    parsed["kind"] = parsed.pop("trigger", None)
    for name in ("loss_before", "loss_after", "num_selected"):
        parsed.setdefault(name, None)
    own = {name: hint for name, hint in _types(Intervention).items() if name != "event"}
    values = _decode_values({**_types(Event), **own}, parsed, "intervention")
    answer = {name: values.pop(name) for name in own}
    return Intervention(event=Event(**values), **answer)


def _types(cls: type[Record | MatrixChange]) -> dict[str, str]:
    return {spec.name: str(spec.type) for spec in fields(cls)}


def _decode_values(types: dict[str, str], value: object, what: str) -> dict[str, Any]:
    parsed = read_mapping(value, what)
    words = read_mapping(parsed.pop("non_finite", {}), f"'non_finite' of {what}")
    found = read_object(parsed, types, what)
    decoded: dict[str, Any] = {}
    for name, type_name in types.items():
        is_left_out = found[name] is None and "float" in type_name
        if is_left_out and words.get(name) in ("nan", "inf", "-inf"):
            decoded[name] = float(str(words.pop(name)))
        else:
            decoded[name] = _READERS[type_name](found[name], f"{name!r} of {what}")
    if words:
        raise StateError(f"'non_finite' of {what} holds {words}, which it may not.")
    return decoded


_Reader: TypeAlias = Callable[[object, str], object]


def _read_word(words: type[StrEnum]) -> _Reader:
    def read(value: object, what: str) -> StrEnum:
        word = read_text(value, what)
        if word not in list(words):
            raise StateError(f"You gave {word!r} as {what}; it may be {', '.join(words)}.")
        return words(word)

    return read


def _read_matrix(value: object, what: str) -> MatrixChange:
    return MatrixChange(**_decode_values(_types(MatrixChange), value, what))


def _tuple_of(read: _Reader) -> _Reader:
    def read_items(value: object, what: str) -> tuple[object, ...]:
        items = read_list(value, what)
        return tuple(read(item, f"{what}[{index}]") for index, item in enumerate(items))

    return read_items


def _optional(read: _Reader) -> _Reader:
    return lambda value, what: None if value is None else read(value, what)


# The keys are annotations, which are strings in this file, so a new field needs no second table. If
# a field has a new type, the first test that reads a record fails.
_READERS: dict[str, _Reader] = {
    "int": read_integer,
    "int | None": _optional(read_integer),
    "bool | None": _optional(read_bool),
    "float": read_number,
    "float | None": _optional(read_number),
    "str": read_text,
    "EventKind": _read_word(EventKind),
    "Action": _read_word(Action),
    "tuple[int, ...]": _tuple_of(read_integer),
    "tuple[str, ...]": _tuple_of(read_text),
    "tuple[MatrixChange, ...]": _tuple_of(_read_matrix),
}
