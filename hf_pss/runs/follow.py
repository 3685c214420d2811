"""Follow a live run through its files, and report its newest log row, events and stable ranks."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hf_pss.detection.policy import Action
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.records.events import Event, HealthReading, Intervention, Record
from hf_pss.records.strict_json import visible
from hf_pss.runs.folder import (
    EVENTS_FILE,
    HEALTH_FILE,
    MAX_LINE_BYTES,
    METRICS_FILE,
    STATE_FILE,
    SUMMARY_FILE,
    checkpoints_by_step,
)
from hf_pss.runs.records_files import (
    LogRow,
    merged,
    parse_reading,
    parse_record,
    parse_row,
    read_log,
)

# The largest number of bytes that one poll reads from a file. It is twice the longest line, so that
# the newest line is complete wherever the reading begins.
MAX_POLL_BYTES = 2 * MAX_LINE_BYTES
_CHUNK_BYTES = 2**20
_GONE = (-1, -1)
_FILES = (EVENTS_FILE, HEALTH_FILE, METRICS_FILE, STATE_FILE, SUMMARY_FILE)
_MOST_EVENTS = 200
_MOST_CANDIDATES = 5
# The size of the hash of a line. Two lines are confused only after about 2⁶⁴ lines.
_DIGEST_BYTES = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NewLines:
    """The lines that a file has gained since the last poll."""

    lines: tuple[bytes, ...] = ()
    """Complete lines, without their line ends."""
    has_restarted: bool = False
    """Whether the file was replaced or cut since the last poll. `lines` then hold the new file."""
    num_lost: int = 0
    """The number of lines that were too long to be read."""
    has_more: bool = False
    """Whether the file holds more than this poll has read. The next poll continues from here."""


class Tail:
    """Follows one file of lines. The file may not exist yet, may disappear and may be replaced.

    Text after the last line end is held back until its line is complete, because another process
    may still be writing it, or a crash may have cut it short.

    Args:
        path: The file.
        max_bytes: The number of bytes to read from the end of an existing file. It is also the
            largest number of bytes that one poll reads, give or take a chunk of 1 MiB.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_POLL_BYTES) -> None:
        self.path = path
        self.modified_seconds: float | None = None
        """The time of the last write in the units of `time.time`, or None without a file."""
        self._max_bytes = max_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self._skips = self._is_counted = False

    def poll(self) -> NewLines:
        """Return the lines that were added since the last poll."""
        try:
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
                raise FileNotFoundError
            restarted = self._follow(found)
            return self._read(restarted)
        except OSError:
            self.modified_seconds = None
            if self._identity is not None:
                self._identity = _GONE  # a later file may get the same number
            return NewLines()

    def _follow(self, found: os.stat_result) -> bool:
        self.modified_seconds = found.st_mtime
        identity = (found.st_dev, found.st_ino)
        is_known = self._identity is not None
        if identity == self._identity and found.st_size >= self._offset:
            return False
        self._identity, self._rest = identity, b""
        # Read one byte more. If it is a line end, the line after it is complete.
        self._offset = max(0, found.st_size - self._max_bytes - 1)
        self._skips = self._offset > 0
        self._is_counted = False
        return is_known

    def _read(self, restarted: bool) -> NewLines:
        lines: list[bytes] = []
        num_lost = 0
        end = self._offset + self._max_bytes
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while self._offset < end and (chunk := file.read(_CHUNK_BYTES)):
                self._offset += len(chunk)
                *whole, self._rest = (self._rest + chunk).split(b"\n")
                if whole and self._skips:
                    num_lost += not self._is_counted and len(whole[0]) > MAX_LINE_BYTES
                    whole, self._skips, self._is_counted = whole[1:], False, False
                lines += whole
                if len(self._rest) > MAX_LINE_BYTES:
                    num_lost += not self._is_counted
                    self._rest, self._skips, self._is_counted = b"", True, True
            has_more = bool(file.peek(1))
        kept = tuple(line for line in lines if line.strip() and len(line) <= MAX_LINE_BYTES)
        num_lost += sum(len(line) > MAX_LINE_BYTES for line in lines)
        return NewLines(kept, restarted, num_lost, has_more)


@dataclass(slots=True)
class RunState:
    """The state of a run, as far as its files show it."""

    folder: Path
    log: LogRow | None = None
    """The newest row with a training loss. A number that was not finite is NaN."""
    log_source: str = ""
    """The file that holds this row, relative to the run's folder."""
    max_steps: int | None = None
    events: tuple[Record, ...] = ()
    """The newest events, in the order of the file."""
    fresh_events: tuple[Record, ...] = ()
    """The events that are new since the last poll."""
    num_events: int = 0
    num_interventions: int = 0
    reading: HealthReading | None = None
    """The newest health reading. The stable rank of a matrix without a value is NaN."""
    first_reading: HealthReading | None = None
    """The earliest health reading that was read, for comparison."""
    num_unreadable: int = 0
    """The number of lines and states in the current files that could not be read."""
    modified_seconds: float | None = None
    """The time of the last write to any file, in the units of `time.time`."""
    has_resumed: bool = False
    """Whether the run returned to an earlier step since the last poll, which supersedes events."""
    has_ended: bool = False
    """Whether the last step is saved, a demo is complete, or the newest event stopped the run."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.modified_seconds is None


class Follower:
    """Polls the folder of a run repeatedly.

    Args:
        folder: The Trainer's ``output_dir``, or the folder of one run of a demo.

    Raises:
        ConfigurationError: The folder does not exist, or it is not a run but holds runs
            in its subfolders.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigurationError(
                f"There is no folder {visible(folder)}. Give a run's output_dir."
            )
        _refuse_a_folder_of_runs(folder)
        self._state = RunState(folder)
        self._tails = {n: Tail(folder / n) for n in (EVENTS_FILE, HEALTH_FILE, METRICS_FILE)}
        # The hashes of all events, not only of the newest, because after a resume thousands of old
        # lines may be read again.
        self._known: set[bytes] = set()
        self._logs: dict[str, tuple[LogRow, str]] = {}  # of each kind of file, with the path
        self._state_key: tuple[Path, int, int] | None = None
        self._steps_done = 0
        self._num_unreadable: Counter[str] = Counter()
        self._is_behind: dict[str, bool] = {}

    def poll(self) -> RunState:
        """Read everything that is new."""
        # The files that mark the end of a run are checked first. If they exist, all lines that were
        # written before the end exist already.
        state = self._state
        summary_modified = _modified(state.folder / SUMMARY_FILE)
        state_modified = self._poll_state()
        self._poll_events()
        self._poll_health()
        self._poll_metrics()
        written = _newest(*(tail.modified_seconds for tail in self._tails.values()))
        is_done = 0 < (state.max_steps or 0) <= self._steps_done
        has_ended = (
            _is_last(summary_modified, _newest(written, state_modified))
            # A run that extends a finished run in the same folder writes lines before it saves.
            or (is_done and _is_last(state_modified, written))
            or self._has_stopped(state_modified)
        )
        state.has_ended = has_ended and not any(self._is_behind.values())
        if self._logs:
            state.log, state.log_source = max(self._logs.values(), key=lambda one: one[0].step)
        state.num_unreadable = self._num_unreadable.total()
        state.modified_seconds = _newest(written, state_modified, summary_modified)
        return replace(state)

    def _has_stopped(self, state_modified: float | None) -> bool:
        """Return whether the newest event stopped the run and no later step has followed."""
        event = self._state.events[-1] if self._state.events else None
        if not isinstance(event, Event) or event.decision is not Action.STOP:
            return False
        # A state that is older than the event belongs to an earlier run in this folder.
        is_ours = _is_last(state_modified, self._tails[EVENTS_FILE].modified_seconds)
        metrics = self._logs.get(METRICS_FILE)
        known = (self._state.reading, metrics and metrics[0])
        steps = [one.step for one in known if one is not None]
        return max([self._steps_done * is_ours, *steps]) <= event.step

    def _poll_events(self) -> None:
        state, new = self._state, self._new_lines(EVENTS_FILE)
        state.has_resumed = new.has_restarted
        if new.has_restarted:
            state.events, state.num_events, state.num_interventions = (), 0, 0
        records, fresh = list(state.events), []
        for line, record in self._parsed(EVENTS_FILE, new, parse_record):
            records.append(record)
            state.num_events += 1
            is_change = isinstance(record, Intervention) and record.has_changed_weights
            state.num_interventions += is_change
            digest = hashlib.blake2b(line, digest_size=_DIGEST_BYTES).digest()
            if digest not in self._known:
                fresh.append(record)
                self._known.add(digest)
        state.events, state.fresh_events = tuple(records[-_MOST_EVENTS:]), tuple(fresh)

    def _poll_health(self) -> None:
        for _, found in self._parsed(HEALTH_FILE, self._new_lines(HEALTH_FILE), parse_reading):
            if "stable_rank" in found.matrices:
                self._state.reading = found
                first = self._state.first_reading
                if first is None or first.step > found.step:
                    self._state.first_reading = found

    def _poll_metrics(self) -> None:
        for _, row in self._parsed(METRICS_FILE, self._new_lines(METRICS_FILE), parse_row):
            if isinstance(step := row.get("step"), int) and "loss" in row:
                # A demo writes null for a loss that is not finite.
                self._logs[METRICS_FILE] = merged(LogRow(step, loss=math.nan), row), METRICS_FILE

    def _new_lines(self, name: str) -> NewLines:
        new = self._tails[name].poll()
        if new.has_restarted:
            del self._num_unreadable[name]
        self._num_unreadable[name] += new.num_lost
        self._is_behind[name] = new.has_more
        return new

    def _parsed(
        self, name: str, new: NewLines, parse: Callable[[bytes], T]
    ) -> Iterator[tuple[bytes, T]]:
        for line in new.lines:
            try:
                yield line, parse(line)
            except StateError:
                self._num_unreadable[name] += 1

    def _poll_state(self) -> float | None:
        """Read the newest trainer_state.json if it has changed, and return its time of change."""
        try:
            folders = [self._state.folder, *checkpoints_by_step(self._state.folder)]
        except OSError:  # the folder is being removed
            return None
        places = [folder / STATE_FILE for folder in folders]
        dated = [(at, place) for place in places if (at := _modified(place)) is not None]
        if not dated:
            return None
        modified, path = max(dated)
        try:
            key = (path, path.stat().st_mtime_ns, path.stat().st_size)
            if key != self._state_key:
                self._state_key = key
                self._num_unreadable[STATE_FILE] = 0
                self._read_state(path)
        except OSError:  # save_total_limit has removed the checkpoint
            pass
        except StateError:  # it may be only partly written, and is read again when it changes
            self._num_unreadable[STATE_FILE] = 1
        return modified

    def _read_state(self, path: Path) -> None:
        log = read_log(path)
        if log.training:
            source = path.relative_to(self._state.folder).as_posix()
            self._logs[STATE_FILE] = log.training[-1], source
        self._state.max_steps, self._steps_done = log.max_steps or None, log.global_step


def _newest(*times: float | None) -> float | None:
    return max((at for at in times if at is not None), default=None)


def _is_last(at: float | None, others: float | None) -> bool:
    """Return whether a file was written and none of the others was written after it."""
    return at is not None and (others is None or at >= others)


def _modified(path: Path) -> float | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None


def _refuse_a_folder_of_runs(folder: Path) -> None:
    if any((folder / name).exists() for name in _FILES):
        return
    below = {
        path.parent
        for pattern in (f"*/{EVENTS_FILE}", f"*/*/{EVENTS_FILE}", f"*/*/{METRICS_FILE}")
        for path in folder.glob(pattern)
    }
    if not below:
        return
    newest = sorted(below, key=lambda run: -(_modified(run / METRICS_FILE) or 0))
    shown = ", ".join(visible(run) for run in newest[:_MOST_CANDIDATES])
    raise ConfigurationError(
        f"{visible(folder)} is not a run, it holds {len(below)} of them. Give one: {shown}."
    )
