"""What a Trainer logged, read from trainer_state.json, which nobody vouches for."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pss.errors import StateError
from hf_pss.records.strict_json import read_object, visible
from hf_pss.runs.checkpoint import STATE_FILE

__all__ = ["STATE_FILE", "History", "LogRow", "differ_at", "leads_out", "read_history"]

# A row takes 200 bytes; PSS's own scalars make it 600.
MAX_STATE_BYTES = 64 * 2**20
# Larger than any run; keeps steps from being numbers with thousands of digits.
_MAX_STEP = 10**12


@dataclass(frozen=True, slots=True)
class LogRow:
    """What was logged at one step; None where nothing was."""

    step: int
    loss: float | None = None
    """Mean over the steps since the row before. May be NaN or inf."""
    grad_norm: float | None = None
    """Of this step alone, before clipping. May be NaN or inf."""
    learning_rate: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True, slots=True)
class History:
    """A run's log."""

    path: Path
    global_step: int
    max_steps: int | None
    batch_size: int | None
    """Of one device."""
    rows: tuple[LogRow, ...]
    """By step, each step once."""

    @property
    def training(self) -> tuple[LogRow, ...]:
        """The rows with a training loss."""
        return tuple(row for row in self.rows if row.loss is not None)

    @property
    def log_interval(self) -> int:
        """Median distance of rows with a loss, in steps; 1 where there are fewer than two."""
        steps = [row.step for row in self.training]
        gaps = [later - step for step, later in itertools.pairwise(steps)]
        return max(1, round(statistics.median(gaps))) if gaps else 1


def read_history(path: Path) -> History:
    """Read one trainer_state.json; values of another type than expected count as not logged.

    Raises:
        StateError: It is too large, no JSON, or holds no step or no log; or it is a link that leads
            out of its folder.
        OSError: It cannot be read.
    """
    if leads_out(path, path.parent):
        raise StateError(f"{visible(path)} is a link that leads out of its folder: not opened.")
    if not path.is_file():  # a pipe would wait for ever
        raise StateError(f"{visible(path)} is missing, or no regular file.")
    state = read_object(path, max_bytes=MAX_STATE_BYTES, allow_nonfinite=True)
    step, log = _count(state.get("global_step")), state.get("log_history")
    if step is None or not isinstance(log, list):
        raise StateError(f"{visible(path)} is damaged: it holds no global_step or no log_history.")
    rows: dict[int, LogRow] = {}
    for entry in log:
        if isinstance(entry, dict) and (at := _count(entry.get("step"))) is not None:
            rows[at] = _merged(rows.get(at, LogRow(at)), entry)
    return History(
        path=path,
        global_step=step,
        max_steps=_count(state.get("max_steps")),
        batch_size=_count(state.get("train_batch_size")),
        rows=tuple(rows[at] for at in sorted(rows)),
    )


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether a path ends outside of a folder, once all links are followed."""
    # `resolve` raises where links go in a circle.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def differ_at(one: History, other: History) -> int | None:
    """Return the first step at which both logged a loss and not the same one; None where none is.

    NaN equals NaN: a log that was continued holds the same rows.
    """
    losses = {row.step: row.loss for row in other.training}
    for row in one.training:
        found = losses.get(row.step)
        if found is not None and row.loss is not None and found != row.loss:
            if not (math.isnan(found) and math.isnan(row.loss)):
                return row.step
    return None


def _merged(row: LogRow, entry: Mapping[str, Any]) -> LogRow:
    # Training and evaluation log the same step one after the other.
    return LogRow(
        step=row.step,
        loss=_either(_number(entry.get("loss")), row.loss),
        grad_norm=_either(_number(entry.get("grad_norm")), row.grad_norm),
        learning_rate=_either(_number(entry.get("learning_rate")), row.learning_rate),
        eval_loss=_either(_number(entry.get("eval_loss")), row.eval_loss),
    )


def _either(new: float | None, old: float | None) -> float | None:
    return old if new is None else new


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_STEP else None
