"""Which checkpoint to go on from, and why no newer one.

The rule is ours: the newest complete one with finite weights, at least a margin before the onset of
the failure, for the log's medians lag behind what has happened. The margin is 20 steps, how far
back rolling back recovered severe damage (docs/evidence, rescue), or one interval of the log where
that is longer. Where nothing lies that far back: the newest before the onset; where nothing does
either, the oldest after it, as the last resort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.diagnosis import Failure

__all__ = ["DEFAULT_MARGIN_STEPS", "Choice", "choose"]

DEFAULT_MARGIN_STEPS = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to go on from."""

    chosen: CheckpointReport | None
    reason: str
    passed_over: tuple[tuple[CheckpointReport, str], ...]
    """Newer ones, the newest first, each with why it was not taken; all, where none was chosen."""
    is_last_resort: bool = False
    """Whether it was written after the failure began."""


def choose(
    reports: Sequence[CheckpointReport], failure: Failure | None, *, margin_steps: int
) -> Choice:
    """Choose among judged reports.

    Args:
        reports: All checkpoints of the run.
        failure: None where none was found: then the newest usable one is taken.
        margin_steps: See above.
    """
    usable = [one for one in reports if one.is_usable]
    usable = [one for one in usable if not one.is_superseded] or usable
    if not usable:
        why = "none is complete and finite" if reports else "there is none"
        return Choice(None, f"No checkpoint to go on from: {why}.", _passed(reports, None, failure))
    newest = max(usable, key=_step)
    if failure is None:
        reason = f"the newest that is complete; no failure was found{_caveat(newest)}"
        return Choice(newest, reason, _passed(reports, newest, failure))
    before = [one for one in usable if one.step < failure.onset_step]
    far = [one for one in before if one.step <= failure.onset_step - 1 - margin_steps]
    if far or before:
        chosen = max(far or before, key=_step)
        distance = failure.onset_step - chosen.step
        reason = f"complete, and {distance} steps before the failure began"
        if far:
            reason += f" (the margin is {margin_steps})"
        else:
            reason += f": less than the margin of {margin_steps}, but there is no older one"
        reason += _caveat(chosen)
        return Choice(chosen, reason, _passed(reports, chosen, failure, margin_steps))
    chosen = min(usable, key=_step)
    reason = (
        f"the last resort: written {chosen.step - failure.onset_step} steps after the failure "
        "began, and no usable one is older. Its weights may be damaged"
    )
    return Choice(chosen, reason, _passed(reports, chosen, failure), is_last_resort=True)


def _passed(
    reports: Sequence[CheckpointReport],
    chosen: CheckpointReport | None,
    failure: Failure | None,
    margin_steps: int = 0,
) -> tuple[tuple[CheckpointReport, str], ...]:
    least = -1 if chosen is None else chosen.step
    newer = [one for one in reports if one.step > least]
    return tuple(
        (one, _why_not(one, failure, margin_steps))
        for one in sorted(newer, key=_step, reverse=True)
    )


def _why_not(one: CheckpointReport, failure: Failure | None, margin_steps: int) -> str:
    if one.problem is not None:
        return one.problem
    if one.missing:
        return "; ".join(one.missing)
    if one.is_superseded:
        return "of an earlier run in this folder"
    if failure is not None and one.step >= failure.onset_step:
        return f"written after the failure began (step {failure.onset_step})"
    return f"within {margin_steps} steps of the failure"


def _caveat(one: CheckpointReport) -> str:
    return "" if one.inspection is not None else "; its weights were not opened: see for yourself"


def _step(one: CheckpointReport) -> int:
    return one.step
