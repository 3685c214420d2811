"""Every number and file that PSS reports: logged keys, and the JSON-lines files."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Set
from io import FileIO
from pathlib import Path

from hf_pss.records.events import Record, to_json_line
from hf_pss.records.steps import HealthReading

__all__ = [
    "EVENTS_FILE",
    "HEALTH_FILE",
    "REPORTED",
    "REPORTED_WITH_HEALTH",
    "JsonLines",
    "health_line",
    "log_scalars",
    "reading_line",
]

logger = logging.getLogger(__name__)

EVENTS_FILE = "pss_events.jsonl"
HEALTH_FILE = "pss_health.jsonl"

REPORTED: Mapping[str, str] = {
    "pss/grad_norm_preclip": "global gradient norm of this step, before clipping",
    "pss/baseline": "its moving average before this step; from the second accepted step on",
    "pss/threshold": "the norm at which this step would have fired; after the calibration",
    "pss/interventions": "interventions since the start of the run",
    "pss/nonfinite_steps": "non-finite steps since the start of the run",
    "pss/seconds": "seconds spent in PSS since the start of the run",
}
"""Keys of every training log, and what they mean; a number without a value is left out."""

REPORTED_WITH_HEALTH: Mapping[str, str] = {
    "pss/health_seconds": "seconds spent on the health metrics since the run began or was resumed",
}
"""Keys that a training log has besides where ``health`` is on."""


def log_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return a step's numbers under the keys of `REPORTED` and `REPORTED_WITH_HEALTH`."""
    keys = (*REPORTED, *REPORTED_WITH_HEALTH)
    return {key: scalars[name] for key in keys if (name := key.removeprefix("pss/")) in scalars}


def health_line(step: int, stable_ranks: Mapping[str, float]) -> str:
    """Return one line of strict JSON: every matrix's stable rank, null where it has none."""
    return json.dumps({"step": step, "stable_rank": _strict(stable_ranks)}, allow_nan=False)


def reading_line(reading: HealthReading) -> str:
    """Return the same with every metric of every matrix, and ``scalars``; spectra are left out.

    Whoever reads ``stable_rank`` of `health_line` finds it here too.
    """
    matrices = {metric: _strict(values) for metric, values in reading.matrices.items()}
    row = {"step": reading.step, **matrices, "scalars": _strict(reading.scalars)}
    return json.dumps(row, allow_nan=False)


def _strict(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class JsonLines:
    """A JSON-lines file beside the checkpoints that tells one story, also after a resume.

    A run that resumes at step s abandons what an earlier run did after s. Those lines move to
    ``<name>.superseded.jsonl``: the file stays the history of the weights, and nothing is lost.

    Args:
        path: The file; made when the first line is written.
        resumed_step: Steps up to this one stay.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        if path.exists():
            self._supersede(resumed_step)

    def write(self, lines: Iterable[str]) -> None:
        """Append lines; a full disk is a warning, never the end of a training run."""
        data = "".join(f"{line}\n" for line in lines).encode()
        if not data:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                _append(file, data)
        except OSError as error:
            logger.warning("Cannot write %s: %s. Training goes on.", self._path, error)

    def write_records(self, records: Iterable[Record]) -> None:
        """Append events and interventions."""
        self.write(map(to_json_line, records))

    def _supersede(self, resumed_step: int) -> None:
        try:
            # What a crash left of a line is no step's line: it is superseded like the others.
            with self._path.open("rb") as file:
                gone = {i for i, line in enumerate(file) if not _is_up_to(line, resumed_step)}
            if gone:
                self._move(gone)
        except (OSError, MemoryError) as error:  # the latter: a line of gigabytes, which is no line
            logger.warning("Cannot tidy %s: %s. New lines are appended.", self._path, error)

    def _move(self, gone: Set[int]) -> None:
        """Move lines by their numbers; a line at a time, for readings are many and long."""
        partial = self._path.with_suffix(".partial")
        superseded = self._path.with_suffix(".superseded.jsonl")
        with (
            self._path.open("rb") as file,
            partial.open("wb") as kept,
            superseded.open("ab") as others,
        ):
            for i, line in enumerate(file):
                (others if i in gone else kept).write(line.removesuffix(b"\n") + b"\n")
        os.replace(partial, self._path)  # in one piece: a crash leaves the old file or the new


def _append(file: FileIO, data: bytes) -> None:
    """Append whole lines or nothing: half a line would take the next one with it."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        # After a crash, where the disk was too full to tidy up.
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
