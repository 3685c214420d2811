"""The end of a file of lines that another process writes: no line twice, and no half line.

A live run as its files tell it: the newest log, events, and stable ranks.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pss.detection.policy import Action
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.records.events import Event, Intervention, Record, from_json_line
from hf_pss.records.strict_json import parse_object, read_object, visible
from hf_pss.runs.records_files import EVENTS_FILE, HEALTH_FILE

__all__ = ["Follower", "Logs", "News", "Ranks", "RunState", "Tail"]

# An intervention on 70B parameters takes some 150 kB; more is no line of ours.
MAX_LINE_BYTES = 16 * 2**20
# Of a file that is there already, and of what one look adds. Twice the longest line: wherever the
# reading begins, the newest line is whole.
MAX_LOOK_BYTES = 2 * MAX_LINE_BYTES
_CHUNK_BYTES = 2**20
_GONE = (-1, -1)


@dataclass(frozen=True, slots=True)
class News:
    """What a file has gained."""

    lines: tuple[bytes, ...]
    """Whole ones, without their ends."""
    has_restarted: bool
    """The file was replaced or cut since the last look: the lines begin with the new one's."""
    num_lost: int
    """Lines that were too long to be read."""
    has_more: bool = False
    """There is more than one look takes: the next one goes on from here."""


class Tail:
    """Follows one file, which may not exist yet, may vanish, and may be replaced by another.

    What follows the last line's end waits until it is a line: a process may be writing it, and
    what a crash has cut never becomes one.

    Args:
        path: The file.
        max_bytes: How much of a file that is there already is read, from its end; and the most
            that one look reads, but for a chunk of 1 MiB.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOOK_BYTES) -> None:
        self.path = path
        self.modified_seconds: float | None = None
        """When it was last written, as `time.time`; None while it is not there."""
        self._max_bytes = max_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self._skips = self._is_counted = False

    def poll(self) -> News:
        """Return what has come since the last look."""
        try:
            # Not a pipe's end: opening one would wait for its writer.
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError
            restarted = self._follow(found)
            return self._read(restarted)
        except OSError:
            self.modified_seconds = None
            if self._identity is not None:
                self._identity = _GONE  # what comes may be given the same number
            return News((), has_restarted=False, num_lost=0)

    def _follow(self, found: os.stat_result) -> bool:
        self.modified_seconds = found.st_mtime
        identity = (found.st_dev, found.st_ino)
        is_known = self._identity is not None
        if identity == self._identity and found.st_size >= self._offset:
            return False
        self._identity, self._rest = identity, b""
        # One byte more: where it is a line's end, the line behind it is whole.
        self._offset = max(0, found.st_size - self._max_bytes - 1)
        self._skips = self._offset > 0
        self._is_counted = False
        return is_known

    def _read(self, restarted: bool) -> News:
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
        return News(kept, has_restarted=restarted, num_lost=num_lost, has_more=has_more)


METRICS_FILE, STATE_FILE, SUMMARY_FILE = "metrics.jsonl", "trainer_state.json", "summary.json"
_FILES = (EVENTS_FILE, HEALTH_FILE, METRICS_FILE, STATE_FILE, SUMMARY_FILE)
_CHECKPOINT = re.compile(r"checkpoint-\d{1,12}")
# A log of 150 bytes at each of a million steps.
_MAX_STATE_BYTES = 256 * 2**20
_MAX_SUMMARY_BYTES = 2**20
_MOST_EVENTS = 200
_MOST_CANDIDATES = 5
# Of a line that was told: 2⁶⁴ lines before two are taken for one.
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Logs:
    """The newest training log; NaN where a number was not finite, None where there is none."""

    step: int
    source: str
    """The file, below the run's folder."""
    loss: float | None
    grad_norm: float | None
    """Before clipping."""
    baseline: float | None
    threshold: float | None
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class Ranks:
    """Stable ranks of one step; NaN for a matrix of zeros, or one that is not finite."""

    step: int
    by_matrix: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunState:
    """All that is known of a run now."""

    folder: Path
    logs: Logs | None
    max_steps: int | None
    events: tuple[Record, ...]
    """The newest ones, in order."""
    fresh_events: tuple[Record, ...]
    """Those that the look before did not see."""
    num_events: int
    num_interventions: int
    ranks: Ranks | None
    first_ranks: Ranks | None
    """The earliest that was read: what the newest are compared with."""
    num_unreadable: int
    """Lines of the files as they are now, and a state, that could not be read."""
    modified_seconds: float | None
    """When anything was last written, as `time.time`."""
    has_resumed: bool
    """The run has gone back since the last look: events after its checkpoint are superseded."""
    has_ended: bool
    """The last step is saved, a demo has summed up, or the newest event has stopped the run."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.modified_seconds is None


class Follower:
    """Looks at a run's folder again and again.

    Args:
        folder: What the Trainer calls ``output_dir``, or one run of a demo.

    Raises:
        ConfigurationError: No folder, or one whose subfolders hold the runs.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigurationError(
                f"There is no folder {visible(folder)}. Give a run's output_dir."
            )
        self._folder = folder
        _refuse_a_folder_of_runs(folder)
        self._tails = {n: Tail(folder / n) for n in (EVENTS_FILE, HEALTH_FILE, METRICS_FILE)}
        self._events: deque[Record] = deque(maxlen=_MOST_EVENTS)
        # Beyond `_events`: a resume may bring thousands of lines again.
        self._told: set[bytes] = set()
        self._num_events = self._num_interventions = 0
        self._ranks: Ranks | None = None
        self._first_ranks: Ranks | None = None
        self._metrics: Logs | None = None
        self._state_key: tuple[str, int, int] | None = None
        self._state: Logs | None = None
        self._max_steps: int | None = None
        self._steps_done = 0
        self._num_unreadable: Counter[str] = Counter()
        self._is_behind: dict[str, bool] = {}

    def poll(self) -> RunState:
        """Read what is new."""
        # What says that the run has ended comes first: the lines before it are there by now.
        summary_modified = _modified(self._folder / SUMMARY_FILE)
        state_modified = self._poll_state()
        fresh, has_resumed = self._poll_events()
        self._poll_health()
        self._poll_metrics()
        written = _newest(*(tail.modified_seconds for tail in self._tails.values()))
        is_done = 0 < (self._max_steps or 0) <= self._steps_done
        has_ended = (
            _is_last(summary_modified, _newest(written, state_modified))
            # A run that extends a finished one, in the same folder, writes into the tails first.
            or (is_done and _is_last(state_modified, written))
            or self._has_stopped(state_modified)
        )
        return RunState(
            folder=self._folder,
            logs=self._newest_logs(),
            max_steps=self._max_steps,
            events=tuple(self._events),
            fresh_events=fresh,
            num_events=self._num_events,
            num_interventions=self._num_interventions,
            ranks=self._ranks,
            first_ranks=self._first_ranks,
            num_unreadable=self._num_unreadable.total(),
            modified_seconds=_newest(written, state_modified, summary_modified),
            has_resumed=has_resumed,
            has_ended=has_ended and not any(self._is_behind.values()),
        )

    def _has_stopped(self, state_modified: float | None) -> bool:
        """Whether the newest event has ended the run, and no later step has come since."""
        event = self._events[-1] if self._events else None
        if not isinstance(event, Event) or event.decision is not Action.STOP:
            return False
        # A state that is older is of an earlier run in this folder.
        is_ours = _is_last(state_modified, self._tails[EVENTS_FILE].modified_seconds)
        steps = [known.step for known in (self._ranks, self._metrics) if known is not None]
        return max(steps + [self._steps_done] * is_ours, default=0) <= event.step

    def _poll_events(self) -> tuple[tuple[Record, ...], bool]:
        news = self._news(EVENTS_FILE)
        if news.has_restarted:
            self._events.clear()
            self._num_events = self._num_interventions = 0
        fresh = []
        for line in news.lines:
            record = self._record(line)
            if record is None:
                continue
            self._events.append(record)
            self._num_events += 1
            is_change = isinstance(record, Intervention) and record.has_changed_weights
            self._num_interventions += is_change
            digest = hashlib.blake2b(line, digest_size=_DIGEST_BYTES).digest()
            if digest not in self._told:
                fresh.append(record)
                self._told.add(digest)
        return tuple(fresh), news.has_restarted

    def _news(self, name: str) -> News:
        news = self._tails[name].poll()
        if news.has_restarted:
            del self._num_unreadable[name]
        self._num_unreadable[name] += news.num_lost
        self._is_behind[name] = news.has_more
        return news

    def _record(self, line: bytes) -> Record | None:
        try:
            parse_object(line, what="an event")  # no duplicate keys
            return from_json_line(line.decode("utf-8"))
        except StateError:
            self._num_unreadable[EVENTS_FILE] += 1
            return None

    def _poll_health(self) -> None:
        for row in self._rows(HEALTH_FILE):
            step, ranks = row.get("step"), row.get("stable_rank")
            if not isinstance(step, int) or not isinstance(ranks, dict):
                continue
            found = {name: _number(rank, math.nan) for name, rank in ranks.items()}
            self._ranks = Ranks(step, {name: v for name, v in found.items() if v is not None})
            if self._first_ranks is None or self._first_ranks.step > step:
                self._first_ranks = self._ranks

    def _poll_metrics(self) -> None:
        for row in self._rows(METRICS_FILE):
            if isinstance(row.get("step"), int) and "loss" in row:
                self._metrics = _logs(row, METRICS_FILE, prefix="")

    def _rows(self, name: str) -> Iterator[Mapping[str, Any]]:
        for line in self._news(name).lines:
            try:
                yield parse_object(line, what=name)
            except StateError:
                self._num_unreadable[name] += 1

    def _poll_state(self) -> float | None:
        """Read the newest trainer_state.json where it is another than before."""
        places = [self._folder / STATE_FILE]
        try:
            places += [
                folder / STATE_FILE
                for folder in self._folder.iterdir()
                if _CHECKPOINT.fullmatch(folder.name)
            ]
        except OSError:  # the folder is being removed
            return None
        dated = [(at, place) for place in places if (at := _modified(place)) is not None]
        if not dated:
            return None
        modified, path = max(dated)
        try:
            key = (str(path), path.stat().st_mtime_ns, path.stat().st_size)
            if key != self._state_key:
                self._state_key = key
                self._num_unreadable[STATE_FILE] = 0
                self._read_state(path)
        except OSError:  # save_total_limit has removed the checkpoint
            pass
        except StateError:  # it may be half written: it is read again when it has changed
            self._num_unreadable[STATE_FILE] = 1
        return modified

    def _read_state(self, path: Path) -> None:
        state = read_object(path, max_bytes=_MAX_STATE_BYTES, allow_nonfinite=True)
        history = state.get("log_history")
        rows = (
            [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
        )
        trained = [r for r in rows if "loss" in r and isinstance(r.get("step"), int)]
        if trained:
            source = path.relative_to(self._folder).as_posix()
            self._state = _logs(trained[-1], source, prefix="pss/")
        steps, done = state.get("max_steps"), state.get("global_step")
        self._max_steps = steps if isinstance(steps, int) and steps > 0 else None
        self._steps_done = done if isinstance(done, int) else 0

    def _newest_logs(self) -> Logs | None:
        found = [logs for logs in (self._state, self._metrics) if logs is not None]
        return max(found, key=lambda logs: logs.step, default=None)


def _logs(row: Mapping[str, Any], source: str, *, prefix: str) -> Logs:
    loss = _number(row["loss"], math.nan)
    if loss == 0.0 and (_number(row.get(f"{prefix}nonfinite_steps"), None) or 0) > 0:
        loss = math.nan  # the Trainer's filter writes 0.0 where no step was finite
    norm = f"{prefix}grad_norm_preclip"
    return Logs(
        step=row["step"],
        source=source,
        loss=loss,
        grad_norm=_number(row.get(norm, row.get("grad_norm")), None),
        baseline=_number(row.get(f"{prefix}baseline"), None),
        threshold=_number(row.get(f"{prefix}threshold"), None),
        learning_rate=_number(row.get("learning_rate"), None),
    )


def _number(value: object, missing: float | None) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return missing
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _newest(*times: float | None) -> float | None:
    return max((at for at in times if at is not None), default=None)


def _is_last(at: float | None, others: float | None) -> bool:
    """Whether something was written, and nothing else after it."""
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
        f"{visible(folder)} is no run, but holds {len(below)} of them. Give one: {shown}."
    )
