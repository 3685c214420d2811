"""When a run failed, and how: told from its log by stated rules.

What counts as a failure is `hf_pss.detection.explosion`'s definition, with its numbers of steps
turned into rows of the log; what counts as a spike of the gradient is the default detector's rule
(τ times a moving average that does not learn from what it refuses). Everything else here is ours:

- a row is *not finite* where its loss is NaN or inf, where its gradient norm is NaN and PSS did
  not skip that step, or where the loss is exactly 0 although none below 0.01 came before: so the
  Trainer logs NaN (``logging_nan_inf_filter``);
- the *onset* is the step of the last row that was still sound: the loss of a step is taken before
  its update, so that this update is the first that may have done the damage;
- a rise is a ``spike`` where, within one smoothing window of the onset, the gradient norm spiked
  or the loss rose by ``rise_nats`` above the median of the five steps before, and ``slow_damage``
  where neither did;
- at the end of the log, a rise counts from fewer rows: where each of the last five steps' losses
  lies ``rise_nats`` above the lowest median before them, for a run may be killed soon after;
- it is *recovered* once the median loss is back within ``plateau_nats`` of the lowest before it;
  after 20 such, what came since the loss was last back is judged beside its lowest alone;
- ``collapse`` is a loss that stays near the unigram entropy (ln of the vocabulary where nothing
  better is known), since it last moved by ``plateau_nats``; or a median stable rank below a quarter
  of the first one measured while the loss improves no more.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hf_pss.config import PSSConfig
from hf_pss.detection.baseline import Baseline
from hf_pss.detection.explosion import Explosion, ExplosionRule, find_explosion
from hf_pss.detection.policy import Action
from hf_pss.health.verdicts import LOW_SHARE_OF_SIBLINGS
from hf_pss.runs.log import History, LogRow
from hf_pss.runs.notes import Notes

__all__ = ["Diagnosis", "Failure", "FailureKind", "diagnose"]

FailureKind: TypeAlias = Literal["non_finite", "spike", "slow_damage", "collapse"]

_RULE = ExplosionRule()
# No language model's mean loss gets there; a filtered NaN is exactly 0.
_LEAST_LOSS = 0.01
# Rows that a rule of steps comes to at least: one row is an accident.
_MIN_ROWS = 2
_MIN_CALIBRATION_ROWS = 3
_JUMP_STEPS = 5
_MOST_RECOVERIES = 20
_MOST_NAMED = 5

RankRatios: TypeAlias = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Failure:
    """How a run failed."""

    kind: FailureKind
    onset_step: int
    """The first whose update may have done the damage; a checkpoint before it was sound."""
    noticed_step: int
    """The logged step at which the rule was met first."""
    text: str
    """For people, one or two sentences."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What became of a run."""

    failure: Failure | None
    notes: tuple[str, ...]
    """Whatever else is worth knowing: spikes that it recovered from, PSS's own events."""
    unigram_entropy: float | None
    """In nats, what `collapse` was judged by; None where nothing is known."""


_Point: TypeAlias = tuple[int, float | None]
"""Index of a row, and its loss; None where it is not finite."""


def diagnose(
    history: History,
    notes: Notes,
    *,
    ranks: RankRatios = (),
    unigram_entropy: float | None = None,
) -> Diagnosis:
    """Judge a run's log; cost: O(rows).

    Args:
        history: Its log.
        notes: What PSS wrote beside it; empty for a run without PSS.
        ranks: (step, median stable rank over the first one measured), by step.
        unigram_entropy: In nats; ln(vocabulary) bounds it. None: no loss is stuck.
    """
    rows = history.training
    said = _of_events(notes)
    rule = _in_rows(_RULE, history.log_interval)
    failure = None
    if rows:
        jump_rows = max(1, round(_JUMP_STEPS / history.log_interval))
        points = list(enumerate(_losses(rows, notes)))
        entropy = math.inf if unigram_entropy is None else unigram_entropy
        failure, recoveries = _first_lasting(rows, points, rule, entropy, jump_rows)
        said += recoveries
    else:
        said.append("No training loss was logged: nothing can be said about the run's course.")
    failure = failure or _by_evaluation(history) or _after_the_log(history, notes)
    failure = failure or _by_ranks(rows, ranks, rule)
    return Diagnosis(failure, tuple(said), unigram_entropy)


def _in_rows(rule: ExplosionRule, interval: int) -> ExplosionRule:
    return replace(
        rule,
        num_steps=max(_MIN_ROWS, math.ceil(rule.num_steps / interval)),
        plateau_steps=max(2 * _MIN_ROWS, math.ceil(rule.plateau_steps / interval)),
        smoothing_steps=max(1, round(rule.smoothing_steps / interval)),
    )


def _losses(rows: Sequence[LogRow], notes: Notes) -> list[float | None]:
    skipped = {one.step for one in notes.events if one.decision is Action.SKIP_UPDATE}
    found: list[float | None] = []
    least = math.inf
    for row in rows:
        loss = row.loss
        broken = row.grad_norm is not None and math.isnan(row.grad_norm)
        if loss is None or not math.isfinite(loss) or (broken and row.step not in skipped):
            found.append(None)
        elif loss == 0 and least > _LEAST_LOSS:
            found.append(None)
        else:
            least = min(least, loss)
            found.append(loss)
    return found


def _first_lasting(
    rows: Sequence[LogRow],
    points: list[_Point],
    rule: ExplosionRule,
    entropy: float,
    jump_rows: int,
) -> tuple[Failure | None, list[str]]:
    """Find the first failure that the run did not recover from, and tell of the others."""
    said: list[str] = []
    for number in range(2 * _MOST_RECOVERIES):
        if number == _MOST_RECOVERIES:
            points = _last_stretch(points, rule)
            said.append("It recovered more often than is told here; what follows is of its end.")
        losses = [loss for _, loss in points]
        found = find_explosion(losses, rule, unigram_entropy=entropy)
        if found is None or found.kind == "plateau":
            risen = _risen_at_the_end(losses, rule, max(_MIN_ROWS, jump_rows))
            if risen is not None:
                return _risen(rows, points, risen, rule, jump_rows, to_the_end=True)[-1], said
            return None if found is None else _stuck(rows, points, found, rule, entropy), said
        begin = found.step - 1
        if found.kind == "non_finite":
            end = next((i for i in range(begin, len(losses)) if losses[i] is not None), None)
            failure = _not_finite(rows, points, begin)
        else:
            begin, end, failure = _risen(rows, points, begin, rule, jump_rows)
        if end is None:
            return failure, said
        first, last = rows[points[begin][0]].step, rows[points[end][0]].step
        said.append(
            f"Between steps {first} and {last} the run recovered by itself from a "
            f"{_NAMES[failure.kind]}."
        )
        points = points[:begin] + points[end:]
    return None, said


def _last_stretch(points: list[_Point], rule: ExplosionRule) -> list[_Point]:
    """Keep the rows of the lowest median, and those since the loss was last back near it.

    A search costs one pass over the log: of one with very many recoveries the end is judged alone.
    """
    medians = _medians([loss for _, loss in points], rule.smoothing_steps)
    finite = [(median, place) for place, median in enumerate(medians) if median is not None]
    if not finite:
        return points
    lowest, at = min(finite)
    back = max(place for median, place in finite if median <= lowest + rule.plateau_nats)
    since = max(at + 1, back + 1 - 2 * rule.smoothing_steps)
    return points[max(0, at + 1 - rule.smoothing_steps) : at + 1] + points[since:]


_NAMES = {
    "non_finite": "stretch that was not finite",
    "spike": "spike",
    "slow_damage": "slow rise",
    "collapse": "collapse",
}


def _not_finite(rows: Sequence[LogRow], points: Sequence[_Point], begin: int) -> Failure:
    index = points[begin][0]
    row, before = rows[index], _before(rows, index)
    how = (
        "the loss was logged as 0, as the Trainer logs NaN"
        if row.loss == 0
        else "the loss was NaN or inf"
        if row.loss is not None and not math.isfinite(row.loss)
        else "the gradient norm was NaN"
    )
    return Failure(
        kind="non_finite",
        onset_step=before,
        noticed_step=row.step,
        text=f"At step {row.step} {how}, and no sound row follows; "
        + (f"step {before} was finite still." if index else "not one row was finite."),
    )


def _risen_at_the_end(
    losses: Sequence[float | None], rule: ExplosionRule, num_rows: int
) -> int | None:
    """Return where the last rows begin that all lie above what came before; None if too few do."""
    medians = _medians(losses, rule.smoothing_steps)
    lowest = list(itertools.accumulate((math.inf if m is None else m for m in medians), min))
    begin = len(losses)
    while begin > 1 and (last := losses[begin - 1]) is not None:
        if last < lowest[begin - 2] + rule.rise_nats:
            break
        begin -= 1
    return begin if len(losses) - begin >= num_rows and begin > 0 else None


def _risen(
    rows: Sequence[LogRow],
    points: Sequence[_Point],
    begin: int,
    rule: ExplosionRule,
    jump_rows: int,
    *,
    to_the_end: bool = False,
) -> tuple[int, int | None, Failure]:
    medians = _medians([loss for _, loss in points], rule.smoothing_steps)
    earlier = [one for one in medians[:begin] if one is not None]
    lowest = min(earlier)
    back = lowest + rule.plateau_nats
    sound = max(i for i, one in enumerate(medians[:begin]) if one is not None and one <= back)
    after = range(begin, 0 if to_the_end else len(points))
    end = next((i for i in after if (m := medians[i]) is not None and m <= back), None)
    jumps = _jumps(rows, points, rule, jump_rows)
    near = [i for i in jumps if abs(i - sound) <= rule.smoothing_steps + 1 or sound < i <= begin]
    first = min([*near, sound + 1])
    index, noticed = points[first][0], rows[points[begin][0]].step
    onset = _before(rows, index)
    highest = statistics.median(loss for _, loss in points[begin:end] if loss is not None)
    rise = f"rose from {lowest:.3g} to {highest:.3g} nats (medians)"
    if near:
        row = rows[points[near[0]][0]]
        norm = "" if row.grad_norm is None else f", gradient norm {row.grad_norm:.3g}"
        text = f"A spike at step {row.step} (loss {row.loss:.3g}{norm}): the loss {rise}"
        kind: FailureKind = "spike"
    else:
        text = f"From step {onset} on, without any spike, the loss {rise}"
        kind = "slow_damage"
    text += " and did not come back." if end is None else "."
    return first, end, Failure(kind, onset, noticed, text)


def _stuck(
    rows: Sequence[LogRow],
    points: Sequence[_Point],
    found: Explosion,
    rule: ExplosionRule,
    entropy: float,
) -> Failure:
    index = points[_stuck_since([loss for _, loss in points], found.step - 1, rule)][0]
    before = _before(rows, index)
    last = [row.loss for row in rows[index:] if row.loss is not None]
    since = f"since step {rows[index].step}" if index else "from the beginning"
    return Failure(
        kind="collapse",
        onset_step=before,
        noticed_step=rows[index].step,
        text=f"The loss is stuck {since}: its median is {statistics.median(last):.3g}, and knowing "
        f"nothing but the frequencies of tokens costs at most {entropy:.3g} nats.",
    )


def _stuck_since(losses: Sequence[float | None], begin: int, rule: ExplosionRule) -> int:
    """Walk back from a plateau for as long as the median stays within ``plateau_nats`` of its own.

    The entropy of the whole text is not that of the batches: a stuck loss wavers about the limit.
    """

    def level(start: int) -> float:
        window = [v for v in losses[start : start + rule.plateau_steps] if v is not None]
        return statistics.median(window) if window else math.inf

    own = level(begin)
    while begin > 0 and abs(level(begin - 1) - own) <= rule.plateau_nats:
        begin -= 1
    return begin


def _jumps(
    rows: Sequence[LogRow], points: Sequence[_Point], rule: ExplosionRule, jump_rows: int
) -> list[int]:
    """Places in `points` at which the gradient norm or the loss jumped."""
    config = PSSConfig()
    calibration = min(config.calibration_steps, max(_MIN_CALIBRATION_ROWS, len(points) // 4))
    norms = Baseline(config.baseline_alpha, calibration, config.patience_steps)
    window: list[float] = []
    found = []
    for place, (index, loss) in enumerate(points):
        norm = rows[index].grad_norm
        jumped = False
        if norm is not None and math.isfinite(norm) and norm >= 0:
            ratio = norms.ratio(norm) if norms.is_calibrated else None
            jumped = ratio is not None and ratio > config.threshold_ratio
            if jumped:
                norms.refuse(norm)
            else:
                norms.accept(norm)
        if loss is not None:
            jumped |= bool(window) and loss >= statistics.median(window) + rule.rise_nats
            window = [*window, loss][-jump_rows:]
        if jumped:
            found.append(place)
    return found


def _medians(losses: Sequence[float | None], width: int) -> list[float | None]:
    """Of the last `width` finite losses, as `find_explosion` takes them."""
    window: list[float] = []
    found: list[float | None] = []
    for loss in losses:
        if loss is None:
            found.append(None)
            continue
        window = [*window, loss][-width:]
        found.append(statistics.median(window))
    return found


def _by_evaluation(history: History) -> Failure | None:
    evaluated = [row for row in history.rows if row.eval_loss is not None]
    if not evaluated or _is_finite(evaluated[-1].eval_loss):
        return None
    sound = [row.step for row in evaluated if _is_finite(row.eval_loss)]
    begin = max(sound, default=0)
    first = next(row.step for row in evaluated if row.step > begin or begin == 0)
    return Failure(
        kind="non_finite",
        onset_step=begin + 1,
        noticed_step=first,
        text=f"The validation loss at step {first} is NaN or inf; it was finite at step {begin}.",
    )


def _after_the_log(history: History, notes: Notes) -> Failure | None:
    """What PSS wrote down after the last row: a run that was killed has no later log."""
    last = history.rows[-1].step if history.rows else 0
    late = [step for step in notes.nonfinite_steps() if step > last]
    if len(late) < _RULE.num_steps:
        return None
    return Failure(
        kind="non_finite",
        onset_step=late[0] - 1,
        noticed_step=late[0],
        text=f"From step {late[0]} on, after the last logged row, PSS saw {len(late)} steps that "
        "were not finite.",
    )


def _by_ranks(rows: Sequence[LogRow], ranks: RankRatios, rule: ExplosionRule) -> Failure | None:
    if not ranks or ranks[-1][1] >= LOW_SHARE_OF_SIBLINGS:
        return None
    sound = max((at for at, ratio in ranks if ratio >= LOW_SHARE_OF_SIBLINGS), default=0)
    first = next(at for at, _ in ranks if at > sound or sound == 0)
    finite = [(r.step, r.loss) for r in rows if r.loss is not None and math.isfinite(r.loss)]
    before = [loss for step, loss in finite if step <= first][-rule.smoothing_steps :]
    since = [loss for step, loss in finite if step > first]
    if not before or len(since) < rule.smoothing_steps:
        return None
    now = statistics.median(since[-rule.smoothing_steps :])
    if now < statistics.median(before) - rule.plateau_nats:
        return None  # ranks fall in healthy training, too: here it still learns
    return Failure(
        kind="collapse",
        onset_step=sound + 1,
        noticed_step=first,
        text=f"Without any spike, half of the matrices have fallen below {ranks[-1][1]:.0%} of the "
        f"stable rank that they began with, and since step {first} the loss, {now:.3g}, improves "
        "no more.",
    )


def _of_events(notes: Notes) -> list[str]:
    said = []
    if notes.events:
        steps = [one.step for one in notes.events]
        said.append(
            f"PSS wrote down {len(steps)} events, from step {min(steps)} to {max(steps)}, and "
            f"answered {notes.num_interventions} by smoothing."
        )
    if bad := notes.nonfinite_steps():
        named = ", ".join(map(str, bad[:_MOST_NAMED]))
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        said.append(f"PSS met steps that were not finite: {named}{more}.")
    if notes.num_unreadable:
        said.append(f"{notes.num_unreadable} lines of PSS's files could not be read.")
    return said


def _before(rows: Sequence[LogRow], index: int) -> int:
    """The step of the row before; 0, before every update, where there is none."""
    return rows[index - 1].step if index else 0


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
