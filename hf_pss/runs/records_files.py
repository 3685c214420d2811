"""Write and read the JSON-lines files of events and health readings beside the checkpoints."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from hf_pss.detection.state import read_integer
from hf_pss.errors import StateError
from hf_pss.records.events import (
    Event,
    EventKind,
    Intervention,
    Record,
    from_json_line,
    to_json_line,
)
from hf_pss.records.steps import HealthReading
from hf_pss.records.strict_json import finite_or_none, number_of, parse_object
from hf_pss.runs.folder import (
    EVENTS_FILE,
    HEALTH_FILE,
    MAX_LINE_BYTES,
    MAX_LINES_BYTES,
    leads_out,
    replacing,
)

__all__ = [
    "REPORTED",
    "REPORTED_WITH_HEALTH",
    "JsonLines",
    "ParsedLines",
    "RunRecords",
    "health_line",
    "log_scalars",
    "parse_reading",
    "parse_record",
    "parse_row",
    "rank_ratios",
    "read_lines",
    "read_run_records",
    "reading_line",
]

logger = logging.getLogger(__name__)

REPORTED: Mapping[str, str] = {
    "pss/grad_norm_preclip": "global gradient norm of this step, before clipping",
    "pss/baseline": "its moving average before this step; from the second accepted step on",
    "pss/threshold": "the norm at which this step would have fired; after the calibration",
    "pss/interventions": "interventions since the start of the run",
    "pss/nonfinite_steps": "non-finite steps since the start of the run",
    "pss/seconds": "seconds spent in PSS since the start of the run",
}
"""The keys of every training log and their meanings. A number without a value is left out."""

REPORTED_WITH_HEALTH: Mapping[str, str] = {
    "pss/health_seconds": "seconds spent on the health metrics since the run began or was resumed",
}
"""The additional keys of a training log if ``health`` is on."""


def log_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step under the keys of `REPORTED` and `REPORTED_WITH_HEALTH`."""
    keys = (*REPORTED, *REPORTED_WITH_HEALTH)
    return {key: scalars[name] for key in keys if (name := key.removeprefix("pss/")) in scalars}


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
        while left > 0 and (line := stream.readline(MAX_LINE_BYTES)):
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


@dataclass(frozen=True, slots=True)
class RunRecords:
    """A summary of the events and readings of a run."""

    events: tuple[Event, ...] = ()
    """All events in the order of the file, including those that led to smoothing."""
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
    records = read_lines(run_dir / EVENTS_FILE, parse_record)
    readings = read_lines(run_dir / HEALTH_FILE, parse_reading)
    ranks = ((one.step, one.matrices.get("stable_rank", {})) for one in readings.rows)
    return RunRecords(
        events=tuple(r.event if isinstance(r, Intervention) else r for r in records.rows),
        num_interventions=sum(
            isinstance(r, Intervention) and r.has_changed_weights for r in records.rows
        ),
        rank_ratios=rank_ratios(ranks),
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
    found, first = [], dict[str, float]()
    for step, by_matrix in ranks:
        sound = {name: rank for name, rank in by_matrix.items() if 0 < rank < _MOST_RANK}
        first = sound | first
        if sound:
            found.append((step, statistics.median(sound[name] / first[name] for name in sound)))
    return tuple(found)
