"""Read the log of the Trainer, and write and read the events and health readings of PSS.

The log is in trainer_state.json, a file that may come from anyone. The events and readings are in
JSON-lines files beside the checkpoints.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from hf_pss.detection.state import number_of, read_integer
from hf_pss.errors import StateError
from hf_pss.records.events import (
    Event,
    EventKind,
    HealthReading,
    Intervention,
    Record,
    from_json_line,
    to_json_line,
)
from hf_pss.records.strict_json import finite_or_none, parse_object, read_object, visible
from hf_pss.runs.folder import (
    EVENTS_FILE,
    HEALTH_FILE,
    MAX_LINE_BYTES,
    MAX_LINES,
    MAX_LINES_BYTES,
    MAX_STATE_BYTES,
    STATE_FILE,
    leads_out,
    replacing,
)

logger = logging.getLogger(__name__)

REPORTED: Mapping[str, str] = {
    "pss/grad_norm_preclip": "global gradient norm of this step, before clipping",
    "pss/baseline": "its moving average before this step; from the second accepted step on",
    "pss/threshold": "the norm at which this step would have fired; after the calibration",
    "pss/interventions": "interventions since the start of the run",
    "pss/nonfinite_steps": "non-finite steps since the start of the run",
}
"""The keys of every training log and their meanings. A number without a value is left out. No
clock is among them, because a checkpoint holds the logs, and equal runs save equal states."""


def log_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step under the keys of `REPORTED`."""
    return {key: scalars[name] for key in REPORTED if (name := key.removeprefix("pss/")) in scalars}


def health_line(step: int, stable_ranks: Mapping[str, float]) -> str:
    """Return one line of strict JSON with the stable rank of every matrix, null for NaN and inf."""
    return reading_line(HealthReading(step, matrices={"stable_rank": stable_ranks}), scalars=False)


def reading_line(reading: HealthReading, *, scalars: bool = True) -> str:
    """Return one line of strict JSON with every metric of every matrix, null for NaN and inf.

    Args:
        reading: The reading to write. Its spectra are left out.
        scalars: Whether to write also the numbers of the entire model, under ``scalars``.
    """
    row = {"step": reading.step, **{name: _strict(by) for name, by in reading.matrices.items()}}
    if scalars:
        row["scalars"] = _strict(reading.scalars)
    return json.dumps(row, allow_nan=False)


def _strict(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in values.items()}


class JsonLines:
    """A JSON-lines file beside the checkpoints that holds the history of one run.

    If a run resumes at step s, the steps of an earlier run after s no longer belong to its history.
    The lines of those steps move to ``<name>.superseded.jsonl``. The file therefore always
    describes the history of the current weights, and no line is lost.

    Args:
        path: The file. The first line creates it.
        resumed_step: Lines up to this step stay in the file.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        if path.exists():
            self._supersede(resumed_step)

    def write(self, lines: Iterable[str]) -> None:
        """Append lines. If the disk is full, log a warning and let training continue."""
        data = "".join(f"{line}\n" for line in lines).encode()
        if not data:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                _append(file, data)
        except OSError as error:
            logger.warning("Cannot write %s: %s. Training continues.", self._path, error)

    def write_records(self, records: Iterable[Record]) -> None:
        """Append events and interventions."""
        self.write(map(to_json_line, records))

    def _supersede(self, resumed_step: int) -> None:
        try:
            # A line that a crash has cut short belongs to no step and is moved as well.
            with self._path.open("rb") as file:
                gone = {i for i, line in enumerate(file) if not _is_up_to(line, resumed_step)}
            if gone:
                self._move(gone)
        except (OSError, MemoryError) as error:  # a "line" of gigabytes raises MemoryError
            logger.warning("Cannot tidy %s: %s. New lines are appended.", self._path, error)

    def _move(self, gone: Set[int]) -> None:
        """Move lines by their numbers, one at a time, because there are many long readings."""
        superseded = self._path.with_suffix(".superseded.jsonl")
        with (
            self._path.open("rb") as file,
            replacing(self._path) as kept,
            superseded.open("ab") as others,
        ):
            for i, line in enumerate(file):
                (others if i in gone else kept).write(line.removesuffix(b"\n") + b"\n")


def _append(file: FileIO, data: bytes) -> None:
    """Append complete lines or nothing, because a partial line would damage the next line."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        # The file may end with a partial line, if a crash cut it and the disk was too full to tidy.
        data = data if file.read(1) == b"\n" else b"\n" + data
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(size)
        raise


def _is_up_to(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        return False


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParsedLines(Generic[T]):
    """The lines of a file that could be read, in the order of the file."""

    rows: tuple[T, ...] = ()
    num_unreadable: int = 0
    """The number of lines that were left out because they are malformed, have a different version,
    or are of an unknown kind."""
    is_cut: bool = False
    """Whether the last line is incomplete and was left out. `num_unreadable` does not count it."""

    @property
    def num_lost(self) -> int:
        """The total number of lines that were left out."""
        return self.num_unreadable + self.is_cut


def read_lines(path: Path, parse: Callable[[bytes], T]) -> ParsedLines[T]:
    """Parse a file of lines, one line at a time.

    A missing file counts as empty, and so does a link that leads out of its folder.

    Args:
        path: The file.
        parse: `parse_record`, `parse_reading` or `parse_row`.

    Raises:
        OSError: The file cannot be read.
    """
    rows: list[T] = []
    num_unreadable, is_cut, left = 0, False, MAX_LINES_BYTES
    if leads_out(path, path.parent) or not path.is_file():
        return ParsedLines()
    with path.open("rb") as stream:
        while left > 0 and len(rows) < MAX_LINES and (line := stream.readline(MAX_LINE_BYTES)):
            left -= len(line)
            if not line.strip():
                continue
            try:
                rows.append(parse(line))
            except StateError:
                is_cut = not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES
                num_unreadable += not is_cut
    return ParsedLines(tuple(rows), num_unreadable, is_cut)


def parse_record(line: bytes) -> Record:
    """Return the event or intervention of a line.

    Raises:
        StateError: The line is malformed, has a different version, or is of an unknown kind.
    """
    parse_object(line, what="an event")  # rejects duplicate keys
    return from_json_line(line.decode())


def parse_reading(line: bytes) -> HealthReading:
    """Return the reading of a line. A value that is not a number becomes NaN.

    Raises:
        StateError: The line is not a JSON object with a step.
    """
    row = parse_row(line)
    step = read_integer(row.get("step"), what="the step of a health reading")
    matrices = {
        metric: {name: math.nan if (n := number_of(v)) is None else n for name, v in by.items()}
        for metric, by in row.items()
        if isinstance(by, dict)
    }
    return HealthReading(step, matrices.pop("scalars", {}), matrices)


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. NaN and Infinity count as numbers.

    Raises:
        StateError: The line is not a JSON object.
    """
    return parse_object(line, what="A line", allow_nonfinite=True)


# No stable rank is as large as this number.
_MOST_RANK = 1e9
# The largest models have about 70,000. A file may name others in each line.
_MOST_MATRICES = 2**17


@dataclass(frozen=True, slots=True)
class RunRecords:
    """A summary of the events and readings of a run."""

    events: tuple[Event, ...] = ()
    """All events in the order of the file, including those that led to smoothing. Their names and
    reasons are left out."""
    num_interventions: int = 0
    rank_ratios: tuple[tuple[int, float], ...] = ()
    """The result of the function `rank_ratios`."""
    num_unreadable: int = 0
    """The number of lines that were left out."""

    def nonfinite_steps(self) -> tuple[int, ...]:
        """Return the steps whose loss or gradient was NaN or inf."""
        return tuple(one.step for one in self.events if one.kind is EventKind.NON_FINITE)


def read_run_records(run_dir: Path) -> RunRecords:
    """Read the events and readings of a run. A missing file counts as empty.

    Raises:
        OSError: A file cannot be read.
    """
    first: dict[str, float] = {}

    def brief(line: bytes) -> tuple[Event, bool]:
        record = parse_record(line)
        event = record.event if isinstance(record, Intervention) else record
        # Names and words may take many times the size of the file.
        event = replace(event, detector="", fired=(), new_level=(), reason="")
        return event, isinstance(record, Intervention) and record.has_changed_weights

    def ratio(line: bytes) -> tuple[int, float | None]:
        reading = parse_reading(line)
        return reading.step, _rank_ratio(reading.matrices.get("stable_rank", {}), first)

    records = read_lines(run_dir / EVENTS_FILE, brief)
    readings = read_lines(run_dir / HEALTH_FILE, ratio)
    return RunRecords(
        events=tuple(event for event, _ in records.rows),
        num_interventions=sum(has_changed for _, has_changed in records.rows),
        rank_ratios=tuple((step, found) for step, found in readings.rows if found is not None),
        num_unreadable=records.num_lost + readings.num_lost,
    )


def rank_ratios(ranks: Iterable[tuple[int, Mapping[str, float]]]) -> tuple[tuple[int, float], ...]:
    """Return for each step how the stable ranks compare to their first values.

    Args:
        ranks: Pairs of a step and the stable rank of each matrix, sorted by step. Ranks of NaN and
            0 are ignored.

    Returns:
        Pairs of a step and a median over the matrices. The median is that of the stable rank
        divided by the first stable rank of the same matrix.
    """
    first: dict[str, float] = {}
    ratios = ((step, _rank_ratio(by_matrix, first)) for step, by_matrix in ranks)
    return tuple((step, ratio) for step, ratio in ratios if ratio is not None)


def _rank_ratio(ranks: Mapping[str, float], first_: dict[str, float]) -> float | None:
    """Return the median ratio to the first values, and add the values of new matrices to them."""
    ratios = [
        rank / first_.setdefault(name, rank)
        for name, rank in ranks.items()
        if 0 < rank < _MOST_RANK and (name in first_ or len(first_) < _MOST_MATRICES)
    ]
    return statistics.median(ratios) if ratios else None


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
    false if the count has risen. Without a count, a loss of exactly 0 is true beside a finite
    gradient norm above 0. Beside a norm that is NaN, inf, 0 or missing, it is false unless an
    earlier loss was 0.01 or less.

    Args:
        rows: The rows, sorted by step.
    """
    least, num_before, kept = math.inf, 0.0, []
    for row in rows:
        if row.loss == 0.0:
            now = row.nonfinite_steps
            has_risen = now is not None and (now > num_before or 0 < now < num_before)
            has_gradient = row.grad_norm is not None and 0 < row.grad_norm < math.inf
            if has_risen or (now is None and not has_gradient and least > _LEAST_LOSS):
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
