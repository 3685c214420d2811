"""Read the log of a Trainer from trainer_state.json, a file that may come from anyone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_pss.errors import StateError
from hf_pss.records.strict_json import number_of, read_object, visible
from hf_pss.runs.folder import MAX_STATE_BYTES, STATE_FILE, leads_out

__all__ = [
    "LogRow",
    "RunLog",
    "differ_at",
    "merged",
    "read_log",
    "read_state",
    "without_false_zeros",
]

# No run has more steps than this. The limit rejects a step with thousands of digits.
_MAX_STEP = 10**12
# The mean loss of a language model stays above this value.
_LEAST_LOSS = 0.01


@dataclass(frozen=True, slots=True)
class LogRow:
    """The numbers that were logged at one step. A number that was not logged is None."""

    step: int
    loss: float | None = None
    """The mean loss over the steps since the previous row. It may be NaN or inf."""
    grad_norm: float | None = None
    """The gradient norm of this step alone, before clipping. It may be NaN or inf."""
    learning_rate: float | None = None
    eval_loss: float | None = None
    baseline: float | None = None
    threshold: float | None = None
    nonfinite_steps: float | None = None
    """The number of non-finite steps that PSS has counted since the start of the run."""
    is_false_zero: bool = False
    """Whether the file holds a loss of 0 that stands for NaN. See `without_false_zeros`."""


# For each number, the key of the Trainer comes first, then the key of PSS in a Trainer's log, then
# the key in the metrics of a demo.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "grad_norm": ("grad_norm", "pss/grad_norm_preclip", "grad_norm_preclip"),
    "learning_rate": ("learning_rate",),
    "eval_loss": ("eval_loss",),
    "baseline": ("pss/baseline", "baseline"),
    "threshold": ("pss/threshold", "threshold"),
    "nonfinite_steps": ("pss/nonfinite_steps", "nonfinite_steps"),
}


@dataclass(frozen=True, slots=True)
class RunLog:
    """The log of a run."""

    path: Path
    global_step: int
    max_steps: int | None
    batch_size: int | None
    """The batch size of one device."""
    rows: tuple[LogRow, ...]
    """The rows, sorted by step, with one row per step."""

    @property
    def training(self) -> tuple[LogRow, ...]:
        """The rows with a training loss."""
        return tuple(row for row in self.rows if row.loss is not None)

    @property
    def log_interval(self) -> int:
        """The median number of steps between rows with a loss, or 1 for fewer than two rows."""
        steps = [row.step for row in self.training]
        gaps = [later - step for step, later in itertools.pairwise(steps)]
        return max(1, round(statistics.median(gaps))) if gaps else 1


def read_state(path: Path) -> dict[str, Any]:
    """Read one trainer_state.json as a plain mapping.

    Raises:
        StateError: The file is missing, too large or not JSON, or it holds no ``global_step``.
        OSError: The file cannot be read.
    """
    if not path.is_file():  # opening a pipe would block
        raise StateError(f"{STATE_FILE} is missing, or it is not a regular file.")
    state = read_object(path, max_bytes=MAX_STATE_BYTES, allow_nonfinite=True)
    if _count(state.get("global_step")) is None:
        raise StateError(f"{visible(path)} is damaged: it holds no global_step.")
    return state


def read_log(path: Path) -> RunLog:
    """Read the log of one trainer_state.json. A value of an unexpected type counts as not logged.

    Raises:
        StateError: `read_state` rejects the file, the file holds no log, or it is a link that leads
            out of its folder.
        OSError: The file cannot be read.
    """
    if leads_out(path, path.parent):
        raise StateError(f"{visible(path)} is a link that leads out of its folder: not opened.")
    state = read_state(path)
    log = state.get("log_history")
    if not isinstance(log, list):
        raise StateError(f"{visible(path)} is damaged: it holds no log_history.")
    rows: dict[int, LogRow] = {}
    for entry in log:
        if isinstance(entry, dict) and (step := _count(entry.get("step"))) is not None:
            # Training and evaluation write separate entries for the same step.
            rows[step] = merged(rows.get(step, LogRow(step)), entry)
    return RunLog(
        path=path,
        global_step=state["global_step"],
        max_steps=_count(state.get("max_steps")),
        batch_size=_count(state.get("train_batch_size")),
        rows=without_false_zeros(rows[step] for step in sorted(rows)),
    )


def merged(row: LogRow, entry: Mapping[str, Any]) -> LogRow:
    """Return the row with the numbers of another entry of the same step."""
    found: dict[str, Any] = {
        name: next((n for key in keys if (n := number_of(entry.get(key))) is not None), None)
        for name, keys in _KEYS.items()
    }
    return replace(row, **{name: value for name, value in found.items() if value is not None})


def without_false_zeros(rows: Iterable[LogRow]) -> tuple[LogRow, ...]:
    """Replace a loss of 0 by NaN in rows where the Trainer has logged 0 instead of NaN.

    With ``logging_nan_inf_filter``, the Trainer leaves NaN and inf out of its sum of losses. The
    logged loss is therefore exactly 0 if no step since the previous row was finite. This function
    uses its own rule to recognise such a loss. If PSS has counted non-finite steps, the loss is
    false if the count has risen. Without a count, a loss of exactly 0 is false unless an earlier
    loss was 0.01 or less.

    Args:
        rows: The rows, sorted by step.
    """
    least, num_before, kept = math.inf, 0.0, []
    for row in rows:
        if row.loss == 0.0:
            now = row.nonfinite_steps
            has_risen = now is not None and (now > num_before or 0 < now < num_before)
            if has_risen or (now is None and least > _LEAST_LOSS):
                row = replace(row, loss=math.nan, is_false_zero=True)
        if row.loss is not None and math.isfinite(row.loss):
            least = min(least, row.loss)
        num_before = num_before if row.nonfinite_steps is None else row.nonfinite_steps
        kept.append(row)
    return tuple(kept)


def differ_at(one: RunLog, other: RunLog) -> int | None:
    """Return the first step at which two logs hold different losses, or None.

    NaN counts as equal to NaN, because a continued log repeats the rows of the earlier log.
    """
    losses = {row.step: row.loss for row in other.training}
    for row in one.training:
        if str(row.loss) != str(losses.get(row.step, row.loss)):
            return row.step
    return None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_STEP else None
