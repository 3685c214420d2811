"""Find out from the log of a run when and how the run failed.

The definition of an explosion comes from `hf_pss.detection.explosion`, with its numbers of steps
converted to rows of the log. We added the following rules:

- A row is *not finite* if its loss is NaN or inf, if its loss is a 0 that stands for NaN
  (see `hf_pss.runs.records_files.without_false_zeros`), or if its gradient norm is NaN and PSS did
  not skip that step.
- The *onset* is the step of the last sound row. The loss of a step is computed before its update,
  so the update of this step is the first that may have caused the damage.
- A rise of the loss is a ``spike`` if there is a spike within one smoothing window of the onset.
  Otherwise it is ``slow_damage``.
- A run has *recovered* once the median loss is within ``plateau_nats`` of the lowest median before
  the failure. After 20 recoveries, only two groups of rows are examined: those of the lowest
  median, and those since the loss last returned to its level.
- A ``collapse`` has one of two forms. The loss stays near the unigram entropy, which is taken as
  the ln of the vocabulary size if nothing better is known. The collapse then begins where the loss
  last moved by ``plateau_nats``. In the other form, the median stable rank is below a quarter of
  its first measured value while the loss no longer improves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hf_pss.detection.explosion import (
    JUMP_STEPS,
    Explosion,
    ExplosionRule,
    find_explosion,
    find_rise_at_the_end,
    find_spikes,
    running_medians,
)
from hf_pss.detection.policy import Action
from hf_pss.health.verdicts import LOW_SHARE_OF_SIBLINGS
from hf_pss.records.strict_json import finite_or_none
from hf_pss.runs.records_files import LogRow, RunLog, RunRecords

FailureKind: TypeAlias = Literal["non_finite", "spike", "slow_damage", "collapse"]
RankRatios: TypeAlias = Sequence[tuple[int, float]]

_RULE = ExplosionRule()
_MOST_RECOVERIES = 20
_MOST_NAMED = 5
_NAMES = {
    "non_finite": "stretch that was not finite",
    "spike": "spike",
    "slow_damage": "slow rise",
    "collapse": "collapse",
}


@dataclass(frozen=True, slots=True)
class RunFailure:
    """How a run failed."""

    kind: FailureKind
    onset_step: int
    """The first step whose update may have caused the damage. An earlier checkpoint is sound."""
    noticed_step: int
    """The first logged step at which the rule was met."""
    text: str
    """A description in one or two sentences."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """How a run went."""

    failure: RunFailure | None
    notes: tuple[str, ...]
    """Further findings, such as spikes from which the run recovered and the events of PSS."""


@dataclass(frozen=True, slots=True)
class _Course:
    """The points that are examined, with a rule that counts in rows."""

    rows: Sequence[LogRow]
    """All logged rows with a loss."""
    losses: Sequence[float | None]
    """The loss of each point, or None if it is not finite."""
    indices: Sequence[int]
    """The index of each point in `rows`."""
    rule: ExplosionRule
    jump_rows: int

    def row(self, point: int) -> LogRow:
        return self.rows[self.indices[point]]

    def step_before(self, point: int) -> int:
        """Return the step of the previous row. For the first row this is 0, before any update."""
        index = self.indices[point]
        return self.rows[index - 1].step if index else 0

    def medians(self) -> list[float | None]:
        return list(running_medians(self.losses, self.rule.smoothing_steps))

    def only(self, *parts: slice) -> _Course:
        """Return a course that holds only some of the points."""
        losses = [loss for part in parts for loss in self.losses[part]]
        indices = [index for part in parts for index in self.indices[part]]
        return _Course(self.rows, losses, indices, self.rule, self.jump_rows)


def diagnose(
    log: RunLog,
    records: RunRecords,
    *,
    ranks: RankRatios = (),
    unigram_entropy: float | None = None,
) -> Diagnosis:
    """Find the failure in the log of a run. The cost is O(rows).

    Args:
        log: The log of the run.
        records: The events and readings of PSS, which are empty for a run without PSS.
        ranks: Pairs of a step and the median ratio of a stable rank to its first measured value,
            sorted by step.
        unigram_entropy: The unigram entropy in nats, at most ln(vocabulary). If it is None, no loss
            counts as stuck.
    """
    rows = log.training
    notes = _of_events(records)
    rule = _RULE.in_rows(log.log_interval)
    failure = None
    if rows:
        losses = _sound_losses(rows, records)
        jump_rows = max(1, round(JUMP_STEPS / log.log_interval))
        course = _Course(rows, losses, range(len(rows)), rule, jump_rows)
        entropy = math.inf if unigram_entropy is None else unigram_entropy
        failure, recoveries = _first_lasting(course, entropy)
        notes += recoveries
    else:
        notes.append("No training loss was logged, so the run's course is unknown.")
    failure = failure or _by_evaluation(log) or _after_the_log(log, records)
    failure = failure or _by_ranks(rows, ranks, rule)
    return Diagnosis(failure, tuple(notes))


def _sound_losses(rows: Sequence[LogRow], records: RunRecords) -> list[float | None]:
    nan_norms = {row.step for row in rows if math.isnan(row.grad_norm or 0.0)}
    broken = nan_norms - {one.step for one in records.events if one.decision is Action.SKIP_UPDATE}
    return [None if row.step in broken else finite_or_none(row.loss) for row in rows]


def _first_lasting(course: _Course, entropy: float) -> tuple[RunFailure | None, list[str]]:
    """Find the first failure from which the run did not recover, and describe earlier failures."""
    notes: list[str] = []
    for number in range(2 * _MOST_RECOVERIES):
        if number == _MOST_RECOVERIES:
            course = _last_stretch(course)
            notes.append(
                "It recovered more often than is listed here. The rest describes only its end."
            )
        losses, rule = course.losses, course.rule
        found = find_explosion(losses, rule, unigram_entropy=entropy)
        if found is None or found.kind == "plateau":
            risen = find_rise_at_the_end(losses, rule, num_rows=course.jump_rows)
            if risen is not None:
                return _risen(course, risen, to_the_end=True)[-1], notes
            return None if found is None else _stuck(course, found, entropy), notes
        begin = found.step - 1
        if found.kind == "non_finite":
            end = next((i for i in range(begin, len(losses)) if losses[i] is not None), None)
            failure = _not_finite(course, begin)
        else:
            begin, end, failure = _risen(course, begin)
        if end is None:
            return failure, notes
        notes.append(
            f"Between steps {course.row(begin).step} and {course.row(end).step} the run recovered "
            f"by itself from a {_NAMES[failure.kind]}."
        )
        course = course.only(slice(begin), slice(end, None))
    return None, notes


def _last_stretch(course: _Course) -> _Course:
    """Keep the rows of the lowest median, and those since the loss last returned close to it.

    Each search costs one pass over the log, so only the end of a log with very many
    recoveries is examined.
    """
    width = course.rule.smoothing_steps
    finite = [(median, at) for at, median in enumerate(course.medians()) if median is not None]
    if not finite:
        return course
    lowest, at = min(finite)
    back = max(place for median, place in finite if median <= lowest + course.rule.plateau_nats)
    since = max(at + 1, back + 1 - 2 * width)
    return course.only(slice(max(0, at + 1 - width), at + 1), slice(since, None))


def _not_finite(course: _Course, begin: int) -> RunFailure:
    row, before = course.row(begin), course.step_before(begin)
    how = (
        "the loss was logged as 0, which is how the Trainer logs NaN"
        if row.is_false_zero
        else "the loss was NaN or inf"
        if finite_or_none(row.loss) is None
        else "the gradient norm was NaN"
    )
    end = f"step {before} was still finite." if course.indices[begin] else "no row was finite."
    text = f"At step {row.step} {how}, and no sound row follows; {end}"
    return RunFailure("non_finite", before, row.step, text)


def _risen(
    course: _Course, begin: int, *, to_the_end: bool = False
) -> tuple[int, int | None, RunFailure]:
    """Return the point where a rise begins, the point where it ends or None, and the failure."""
    rule, medians = course.rule, course.medians()
    lowest = min(one for one in medians[:begin] if one is not None)
    back = lowest + rule.plateau_nats
    sound = max(i for i, one in enumerate(medians[:begin]) if one is not None and one <= back)
    after = range(begin, 0 if to_the_end else len(medians))
    end = next((i for i in after if (m := medians[i]) is not None and m <= back), None)
    norms = [course.rows[index].grad_norm for index in course.indices]
    spikes = find_spikes(course.losses, norms, rule, num_rows=course.jump_rows)
    near = [i for i in spikes if abs(i - sound) <= rule.smoothing_steps + 1 or sound < i <= begin]
    first = min([*near, sound + 1])
    onset = course.step_before(first)
    highest = statistics.median(loss for loss in course.losses[begin:end] if loss is not None)
    rise = f"rose from {lowest:.3g} to {highest:.3g} nats (medians)"
    kind: FailureKind = "spike" if near else "slow_damage"
    if near:
        row = course.row(near[0])
        norm = "" if row.grad_norm is None else f", gradient norm {row.grad_norm:.3g}"
        text = f"A spike at step {row.step} (loss {row.loss:.3g}{norm}): the loss {rise}"
    else:
        text = f"From step {onset} on, without any spike, the loss {rise}"
    text += " and did not come back." if end is None else "."
    return first, end, RunFailure(kind, onset, course.row(begin).step, text)


def _stuck(course: _Course, found: Explosion, entropy: float) -> RunFailure:
    point = _stuck_since(course.losses, found.step - 1, course.rule)
    index, step = course.indices[point], course.row(point).step
    losses = (finite_or_none(row.loss) for row in course.rows[index:])
    level = statistics.median(loss for loss in losses if loss is not None)
    since = f"since step {step}" if index else "from the beginning"
    text = (
        f"The loss is stuck {since}: its median is {level:.3g}, and a model that has learned only "
        f"the frequencies of tokens has at most {entropy:.3g} nats."
    )
    return RunFailure("collapse", course.step_before(point), step, text)


def _stuck_since(losses: Sequence[float | None], begin: int, rule: ExplosionRule) -> int:
    """Return the point where a plateau begins, searching backwards from a point on it.

    The plateau extends as long as the median stays within ``plateau_nats`` of its level. The
    unigram entropy cannot mark its beginning. The entropy of the entire text differs from that of
    the batches, so a stuck loss crosses it.
    """

    def level(start: int) -> float:
        window = [v for v in losses[start : start + rule.plateau_steps] if v is not None]
        return statistics.median(window) if window else math.inf

    own = level(begin)
    while begin > 0 and abs(level(begin - 1) - own) <= rule.plateau_nats:
        begin -= 1
    return begin


def _by_evaluation(log: RunLog) -> RunFailure | None:
    losses = [(row.step, row.eval_loss) for row in log.rows if row.eval_loss is not None]
    if not losses or math.isfinite(losses[-1][1]):
        return None
    begin = max((step for step, loss in losses if math.isfinite(loss)), default=0)
    first = next(step for step, _ in losses if step > begin or begin == 0)
    text = f"The validation loss at step {first} is NaN or inf; it was finite at step {begin}."
    return RunFailure("non_finite", begin + 1, first, text)


def _after_the_log(log: RunLog, records: RunRecords) -> RunFailure | None:
    """Examine steps that PSS recorded after the last logged row, as it does in a killed run."""
    last = log.rows[-1].step if log.rows else 0
    late = [step for step in records.nonfinite_steps() if step > last]
    if len(late) < _RULE.num_steps:
        return None
    text = (
        f"From step {late[0]} on, after the last logged row, PSS saw {len(late)} steps that were "
        "not finite."
    )
    return RunFailure("non_finite", late[0] - 1, late[0], text)


def _by_ranks(rows: Sequence[LogRow], ranks: RankRatios, rule: ExplosionRule) -> RunFailure | None:
    if not ranks or ranks[-1][1] >= LOW_SHARE_OF_SIBLINGS:
        return None
    sound = max((at for at, ratio in ranks if ratio >= LOW_SHARE_OF_SIBLINGS), default=0)
    first = next(at for at, _ in ranks if at > sound or sound == 0)
    finite = [(r.step, loss) for r in rows if (loss := finite_or_none(r.loss)) is not None]
    before = [loss for step, loss in finite if step <= first][-rule.smoothing_steps :]
    since = [loss for step, loss in finite if step > first]
    if not before or len(since) < rule.smoothing_steps:
        return None
    now = statistics.median(since[-rule.smoothing_steps :])
    if now < statistics.median(before) - rule.plateau_nats:
        return None  # stable ranks fall in healthy training too, and this run still learns
    text = (
        f"Without any spike, half of the matrices have fallen below {ranks[-1][1]:.0%} of the "
        f"stable rank that they began with, and since step {first} the loss has stayed at "
        f"{now:.3g} without improving."
    )
    return RunFailure("collapse", sound + 1, first, text)


def _of_events(records: RunRecords) -> list[str]:
    notes = []
    if records.events:
        steps = [one.step for one in records.events]
        notes.append(
            f"PSS recorded {len(steps)} events, from step {min(steps)} to {max(steps)}, and "
            f"answered {records.num_interventions} by smoothing."
        )
    if bad := records.nonfinite_steps():
        named = ", ".join(map(str, bad[:_MOST_NAMED]))
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        notes.append(f"PSS met steps that were not finite: {named}{more}.")
    if records.num_unreadable:
        notes.append(f"{records.num_unreadable} lines of PSS's files could not be read.")
    return notes
