"""What is said of a non-finite step: the line in the log, and the error that ends a run."""

from __future__ import annotations

import math

from hf_pss.detection import GLOBAL
from hf_pss.events import Event
from hf_pss.policy import Action

__all__ = ["describe_nonfinite", "describe_stop", "is_worth_a_line"]


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
        f"{_where(event)}: {answer}. Non-finite steps so far: {num_nonfinite_steps}."
    )


def describe_stop(event: Event, *, is_after_update: bool) -> str:
    """Return the error's text: what happened when, whether weights were touched, what to do."""
    moment = "after" if is_after_update else "before"
    return (
        f"Stopped {moment} the update of step {event.step}: {event.detector} = {event.value}, "
        f"loss = {event.loss}{_where(event)} ({event.reason}). "
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


def _where(event: Event) -> str:
    return f", first in {', '.join(event.fired)}" if event.fired not in ((), (GLOBAL,)) else ""
