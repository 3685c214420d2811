"""Find out from the log of a run when and how the run failed.

The definition of an explosion comes from `hf_pss.detection.explosion`, with its numbers of steps
converted to rows of the log. No rule depends on the unit of the loss. We added these rules:

- A row is *not finite* if its loss is NaN or inf, or if its loss is a 0 that stands for NaN (see
  `hf_pss.runs.records_files.without_false_zeros`). A gradient norm of NaN or inf counts if the
  loss is not finite soon after, or if it lasts for five steps and at least three rows. Steps that
  PSS has skipped do not count.
- The *onset* is the step of the last row before the loss rose, or before a spike of the gradient
  norm that came first. The loss of a step is computed before its update, so the update of this step
  is the first that may have caused the damage.
- A rise is a ``spike`` if the loss comes halfway up within three steps or two rows. Otherwise it is
  ``slow_damage``.
- A run has *recovered* once the median loss is back below the limit of a rise, or if most of the
  rise is undone at the end of the log and the loss still falls. After 20 recoveries, only two
  groups of rows are examined: those of the lowest median, and those since the loss last returned
  to its level.
- A ``collapse`` has one of three forms. The loss has not moved by 1 % since the first row. Or it
  stays near the unigram entropy, if `hf-pss train` or the user has given it. Or the median stable
  rank is below a quarter of its first measured value while the loss no longer improves.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hf_pss.detection.explosion import (
    FEW_ROWS,
    Explosion,
    ExplosionRule,
    Level,
    Scatter,
    find_explosion,
    find_norm_spikes,
    find_rise_at_the_end,
    running_levels,
    running_medians,
)
from hf_pss.detection.policy import Action
from hf_pss.health.verdicts import LOW_SHARE_OF_SIBLINGS
from hf_pss.records.strict_json import finite_or_none
from hf_pss.runs.records_files import LogRow, RunLog, RunRecords
from hf_pss.view.numbers import plural

FailureKind: TypeAlias = Literal["non_finite", "spike", "slow_damage", "collapse"]
RankRatios: TypeAlias = Sequence[tuple[int, float]]

_RULE = ExplosionRule()
# The loss is near its lowest level within this share of a rise.
_NEAR = 0.2
_UNMOVED = 0.01
# A rise at the end of the log needs fewer steps than elsewhere: the run may have been stopped.
_END_STEPS = 5
_NAN_ROWS = 3
_LARGEST = 1e300
# A rise is a spike if the loss comes halfway up within this number of steps, or within two rows, of
# which the first may be a mean over steps before and after.
_JUMP_STEPS = 3
_JUMP_ROWS = 2
_LASTS = " and did not come back."
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
    end_rows: int
    """The number of rows that a rise at the end of the log lasts."""
    jump_rows: int
    """The number of rows within which a spike comes halfway up."""

    def row(self, point: int) -> LogRow:
        return self.rows[self.indices[point]]

    def step_before(self, point: int) -> int:
        """Return the step of the previous row. For the first row this is 0, before any update."""
        index = self.indices[point]
        return self.rows[index - 1].step if index else 0

    def levels(self) -> list[Level]:
        return list(running_levels(self.losses, self.rule))

    def only(self, *parts: slice) -> _Course:
        """Return a course that holds only some of the points."""
        losses = [loss for part in parts for loss in self.losses[part]]
        indices = [index for part in parts for index in self.indices[part]]
        return replace(self, losses=losses, indices=indices)


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
        unigram_entropy: The unigram entropy in nats, for a loss in nats per token. If it is None,
            no loss is compared with it.
    """
    rows = log.training
    notes = _of_events(records)
    rule = _RULE.in_rows(log.log_interval)
    failure = None
    if rows:
        end_rows = max(2, round(_END_STEPS / log.log_interval))
        jump_rows = max(_JUMP_ROWS, round(_JUMP_STEPS / log.log_interval))
        losses = _sound_losses(rows, records, max(_NAN_ROWS, end_rows))
        course = _Course(rows, losses, range(len(rows)), rule, end_rows, jump_rows)
        entropy = math.inf if unigram_entropy is None else unigram_entropy
        failure, recoveries = _first_lasting(course, entropy)
        notes += recoveries
    else:
        notes.append("No training loss was logged, so the run's course is unknown.")
    failure = failure or _by_evaluation(log) or _after_the_log(log, records)
    failure = failure or _by_ranks(rows, ranks, rule)
    return Diagnosis(failure, tuple(notes))


def _sound_losses(rows: Sequence[LogRow], records: RunRecords, num_rows: int) -> list[float | None]:
    """Return the losses, and None for rows that are not finite.

    A gradient norm of NaN or inf alone may be an overflow in float16, which the loss scaler skips.
    It counts if it lasts for `num_rows` rows or if the loss is not finite in one of the next rows.
    Steps that PSS has skipped do not count.
    """
    skipped = {one.step for one in records.events if one.decision is Action.SKIP_UPDATE}
    losses = [finite_or_none(row.loss) for row in rows]
    # The median of two larger numbers can overflow.
    losses = [None if loss is not None and abs(loss) > _LARGEST else loss for loss in losses]
    broken = [
        loss is None or (row.step not in skipped and not math.isfinite(row.grad_norm or 0.0))
        for row, loss in zip(rows, losses, strict=True)
    ]
    for is_broken, group in itertools.groupby(range(len(rows)), broken.__getitem__):
        at = list(group)
        if is_broken and (len(at) >= num_rows or any(losses[i] is None for i in at)):
            losses[at[0] : at[-1] + 1] = [None] * len(at)
    return losses


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
        end: int | None = None
        if found is not None and found.kind == "non_finite":
            noticed = begin = found.step - 1
            end = next((i for i in range(begin, len(losses)) if losses[i] is not None), None)
            failure = _not_finite(course, begin)
        elif found is not None and found.kind == "rise":
            noticed = found.step - 1
            begin, end, failure = _risen(course, noticed)
        elif (risen := find_rise_at_the_end(losses, rule, num_rows=course.end_rows)) is not None:
            noticed = risen
            begin, end, failure = _risen(course, noticed, to_the_end=True)
        else:
            stuck = None if found is None else _stuck(course, found, entropy)
            return stuck or _unmoved(course), notes
        if end is None and failure.kind != "non_finite" and _recovers(course, noticed):
            notes.append(f"{failure.text.removesuffix(_LASTS)}, and it still falls.")
            return None, notes
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
    levels = course.levels()
    finite = [(one.median, at) for at, one in enumerate(levels) if one.median is not None]
    if not finite:
        return course
    _, at = min(finite)
    back = max(place for median, place in finite if median <= levels[-1].limit)
    since = max(at + 1, back + 1 - 2 * width)
    return course.only(slice(max(0, at + 1 - width), at + 1), slice(since, None))


def _not_finite(course: _Course, begin: int) -> RunFailure:
    row, before = course.row(begin), course.step_before(begin)
    how = (
        "the loss was logged as 0, which is how the Trainer logs NaN"
        if row.is_false_zero
        else "the loss was NaN or inf"
        if finite_or_none(row.loss) is None
        else "the gradient norm was NaN or inf"
    )
    end = f"step {before} was still finite." if course.indices[begin] else "no row was finite."
    text = f"At step {row.step} {how}, and no sound row follows; {end}"
    return RunFailure("non_finite", before, row.step, text)


def _risen(
    course: _Course, begin: int, *, to_the_end: bool = False
) -> tuple[int, int | None, RunFailure]:
    """Return the point where a rise begins, the point where it ends or None, and the failure."""
    levels = course.levels()
    medians = [one.median for one in levels]
    lowest, limit = levels[begin].lowest, levels[begin].limit
    end = None
    if not to_the_end:
        after = range(begin, len(medians))
        end = next((i for i in after if (m := medians[i]) is not None and m <= limit), None)
    losses = course.losses
    highest = statistics.median(loss for loss in losses[begin:end] if loss is not None)
    half = (lowest + highest) / 2
    at_lowest = max(i for i, m in enumerate(medians[:begin]) if m == lowest)
    few = list(running_medians(losses, min(FEW_ROWS, course.rule.smoothing_steps)))
    points = [(i, v) for i in range(at_lowest, len(few)) if (v := few[i]) is not None]
    top = next((i for i, loss in points if loss >= half), begin)
    below = max((i for i, loss in points if i < top and loss <= limit), default=at_lowest)
    kind: FailureKind = "spike" if top - below <= course.jump_rows else "slow_damage"
    near = lowest + _NEAR * (limit - lowest)
    calm = (i for i in range(at_lowest, top) if (v := losses[i]) is not None and v <= near)
    sound = max(calm, default=at_lowest)
    if kind == "spike":
        sound = max(sound, below - course.end_rows)
    norms = [course.rows[index].grad_norm for index in course.indices]
    spikes = find_norm_spikes(norms)
    near_rows = range(sound - course.rule.smoothing_steps, sound + 1)
    first = next((i for i in spikes if i in near_rows), sound + 1)
    rise = f"rose from {lowest:.3g} to {highest:.3g} (medians)"
    if kind == "spike":
        row = course.row(first if first in spikes else below + 1)
        norm = "" if row.grad_norm is None else f", gradient norm {row.grad_norm:.3g}"
        text = f"A spike at step {row.step} (loss {row.loss:.3g}{norm}): the loss {rise}"
    else:
        text = f"From step {course.step_before(first)} on, without any spike, the loss {rise}"
    text += _LASTS if end is None else "."
    onset = course.step_before(first)
    return first, end, RunFailure(kind, onset, course.row(begin).step, text)


def _recovers(course: _Course, begin: int) -> bool:
    """Whether a rise is nearly undone at the end of the log, and the loss still falls.

    The loss is below its highest level before the rise, four fifths of the rise are undone, and the
    last third of the rows has undone a third of what it found.
    """
    levels = course.levels()
    before = [one.median for one in levels[:begin] if one.median is not None]
    since = [one.median for one in levels[begin:] if one.median is not None]
    lowest, width = levels[begin].lowest, max(course.rule.smoothing_steps, len(since) // 3)
    if len(since) <= width or since[-1] >= max(before):
        return False
    left = since[-1] - lowest
    return left <= _NEAR * (max(since) - lowest) and since[-1 - width] - since[-1] >= left / 2


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


def _unmoved(course: _Course) -> RunFailure | None:
    """Return the failure of a run that has learned nothing, if its loss shows that.

    Over at least 100 steps, the median of the last third differs from that of the first third by
    less than 1 % of it, and from the first loss as well. The loss must scatter by less than 1 %,
    because a noisier loss may hide a descent.
    """
    losses = [loss for loss in course.losses if loss is not None]
    third, rule = len(losses) // 3, course.rule
    if len(losses) < 2 * rule.plateau_steps:
        return None
    first, last = statistics.median(losses[:third]), statistics.median(losses[-third:])
    scatter = Scatter()
    for loss in losses:
        scatter.add(loss)
    least = _UNMOVED * abs(first)
    if max(abs(last - first), abs(last - losses[0]), scatter.value) >= least:
        return None
    text = (
        f"The loss has not moved: it began at {losses[0]:.4g}, and its median is {last:.4g}. Check "
        "the learning rate, and that the optimizer holds the parameters that the loss depends on."
    )
    return RunFailure("collapse", 0, course.rows[-1].step, text)


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
    level = statistics.median(before)
    if now < level - _NEAR * rule.rise(level, 0.0):
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
        first, last = min(steps), max(steps)
        when = f"at step {first}" if first == last else f"from step {first} to {last}"
        notes.append(
            f"PSS recorded {plural(len(steps), 'event')}, {when}, and answered "
            f"{records.num_interventions} by smoothing."
        )
    if bad := records.nonfinite_steps():
        named = ", ".join(map(str, bad[:_MOST_NAMED]))
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        notes.append(f"PSS met steps that were not finite: {named}{more}.")
    if records.num_unreadable:
        lines = plural(records.num_unreadable, "line")
        notes.append(f"{lines} of PSS's files could not be read.")
    return notes
