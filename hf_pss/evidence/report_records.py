"""Read the directory of a demo into frozen records, in which a missing number is NaN.

The runs may be complete or interrupted, and a file may end in the middle of a line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_pss.detection.policy import Action
from hf_pss.detection.state import number_of
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.evidence.rows import Floats
from hf_pss.records.events import Event, HealthReading, Intervention, MatrixChange, Record
from hf_pss.records.strict_json import printable, read_object, visible
from hf_pss.runs.folder import (
    EVENTS_FILE,
    HEALTH_FILE,
    MAX_INDEX_BYTES,
    METRICS_FILE,
    SUMMARY_FILE,
    leads_out,
)
from hf_pss.runs.records_files import parse_reading, parse_record, parse_row, read_lines

JsonObject = Mapping[str, Any]

_LABELS = {
    "plain": "plain Trainer",
    "paper": "PSS as published",
    "floor": "stable-rank floor",
    "anchored": "PSS, anchored",
}
_CURVES = ("loss", "eval_loss", "grad_norm_preclip", "baseline", "threshold")
# A demo has four guards. The figures have a panel for each, and more take minutes.
_MOST_GUARDS, _MOST_RUNS = 12, 2_000
# A demo of 8 layers and 10,000 steps holds 50,000 stable ranks.
_MOST_RANKS = 10**6
_MOST_STEPS = 10**12
# Training computes in float32. A larger number has overflowed, and would overflow the axes.
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def label(guard: str) -> str:
    """Return a guard's name for people. A guard without a label keeps its name."""
    return printable(_LABELS.get(guard, guard))


@dataclass(frozen=True, slots=True)
class Curve:
    """One number per step; NaN where it was not finite."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Floats:
        """The finite values alone."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True, slots=True)
class StableRanks:
    """Stable rank of every watched matrix over time; NaN where a row lacks the matrix."""

    steps: Floats
    names: tuple[str, ...]
    values: Floats
    """(num_steps, num_names)."""


def event_of(record: Record) -> Event:
    """Return the event of a line of ``pss_events.jsonl``, also of an intervention."""
    return record.event if isinstance(record, Intervention) else record


def answer_of(record: Record) -> str:
    """Return what PSS did, in a few words."""
    event = event_of(record)
    if isinstance(record, Intervention):
        is_undone = event.decision is Action.UNDO
        return f"{record.smoothing}, taken back" if is_undone else record.smoothing
    if event.decision is Action.OBSERVE:
        return f"none ({event.reason})"
    return event.decision.replace("_", " ")


def changed_by(record: Record) -> list[MatrixChange]:
    """Return the matrices whose σ₁ fell, with the most singular first."""
    if not isinstance(record, Intervention) or record.event.decision is Action.UNDO:
        return []
    moved = [m for m in record.matrices if number(m.sigma_after) < number(m.sigma_before)]
    return sorted(moved, key=lambda matrix: number(matrix.stable_rank_before))


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The files of one guard with one seed."""

    guard: str
    seed: int
    loss: Curve
    eval_loss: Curve
    grad_norm_preclip: Curve
    baseline: Curve
    threshold: Curve
    stable_ranks: StableRanks
    events: tuple[Record, ...]
    summary: JsonObject
    """The content of ``summary.json``; empty if it is missing."""

    @property
    def title(self) -> str:
        """The run's name for people."""
        return f"{label(self.guard)}, seed {self.seed}"

    @property
    def status(self) -> str:
        """``finished``, or the reason why the run did not reach its end."""
        return str(self.summary.get("status", "unknown")) if self.summary else "unfinished"

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The events after which smoothing changed a weight."""
        return tuple(r for r in self.events if isinstance(r, Intervention) and changed_by(r))


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory: ``run.json``, the runs in it, and a list of missing files."""

    info: JsonObject
    guards: tuple[str, ...]
    runs: tuple[TrainingRun, ...]
    missing: tuple[str, ...]

    @property
    def status(self) -> str:
        """``finished``, ``interrupted`` or ``failed``; ``unknown`` if ``run.json`` has none."""
        return str(self.info.get("status", "unknown"))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all runs, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def reference(self) -> str:
        """The guard with which the others are compared: ``plain``, or else the first."""
        return "plain" if "plain" in self.guards else self.guards[0]

    def of(self, guard: str) -> tuple[TrainingRun, ...]:
        """The runs of one guard, in the order of their seeds."""
        return tuple(run for run in self.runs if run.guard == guard)

    @property
    def unigram_entropy_nats(self) -> float:
        """Loss of a model that predicts the token frequencies; NaN where unknown."""
        return number(self.info.get("unigram_entropy_nats"))


def number(value: object) -> float:
    """Return a JSON value as a float; NaN where it is not a number that float32 can hold."""
    found = number_of(value)
    return found if found is not None and abs(found) <= _LARGEST_FLOAT32 else math.nan


_SEED_FOLDER = re.compile(r"seed-(\d+)")
T = TypeVar("T")


@dataclass(slots=True)
class _Reader:
    """Reads files below `root`, and lists those that it could not read."""

    root: Path
    missing: list[str] = field(default_factory=list)

    def json(self, path: Path) -> JsonObject:
        if self._is_there(path):
            try:
                return read_object(path, max_bytes=MAX_INDEX_BYTES, allow_nonfinite=True)
            except (OSError, StateError):
                self.note(path, "cannot be read")
        return {}

    def lines(
        self, path: Path, parse: Callable[[bytes], T], *, is_optional: bool = False
    ) -> tuple[T, ...]:
        if (is_optional and not path.exists()) or not self._is_there(path):
            return ()
        try:
            found = read_lines(path, parse)
        except OSError:
            self.note(path, "cannot be read")
            return ()
        num_lines = len(found.rows) + found.num_lost
        if found.num_lost:
            self.note(path, f"has {found.num_lost} of {num_lines} lines that cannot be read")
        elif not num_lines and not is_optional:
            self.note(path, "is empty")
        return found.rows

    def _is_there(self, path: Path) -> bool:
        is_file, is_outside = path.is_file(), leads_out(path, path.parent)
        if is_outside:
            self.note(path, "is a link that leads out of its folder")
        elif not is_file:
            self.note(path, "is not a regular file" if path.exists() else "is not there")
        return is_file and not is_outside

    def note(self, path: Path, problem: str) -> None:
        """List a file with its problem."""
        self.missing.append(f"{path.relative_to(self.root).as_posix()} {problem}.")


def load_run_directory(run_dir: Path) -> RunDirectory:
    """Read the files that a demo has written so far.

    If ``run.json`` names guards and seeds, folders of other guards and seeds belong to an earlier
    demo. They are left out.

    Raises:
        ConfigurationError: The folder does not exist, or holds no run.
    """
    if not run_dir.is_dir():
        raise ConfigurationError(
            f"There is no folder {visible(run_dir)}. Give the folder of a demo run."
        )
    reader = _Reader(run_dir)
    info = reader.json(run_dir / "run.json")
    found = {
        (folder.parent.name, int(match[1])): folder
        for folder in run_dir.glob("*/seed-*")
        if (match := _SEED_FOLDER.fullmatch(folder.name))
        and folder.is_dir()
        and not leads_out(folder, run_dir)
    }
    guards = [str(guard) for guard in _sequence(info.get("guards"))]
    guards = guards or sorted({guard for guard, _ in found})
    seeds = {seed for value in _sequence(info.get("seeds")) if (seed := _count(value)) is not None}
    if len(set(guards)) > _MOST_GUARDS or max(len(found), len(seeds)) > _MOST_RUNS:
        raise ConfigurationError(
            f"{visible(run_dir)} names more than {_MOST_GUARDS} guards, or has more than "
            f"{_MOST_RUNS} runs. No demo has so many. Move some of its folders away."
        )
    runs: list[TrainingRun] = []
    for guard in dict.fromkeys(guards):
        own = sorted(seed for name, seed in found if name == guard and (seed in seeds or not seeds))
        absent = [f"{guard}/seed-{seed}" for seed in sorted(seeds - {*own})] if own else [guard]
        reader.missing += [f"{name} has left nothing." for name in absent]
        runs += [_load_run(reader, guard, seed, found[guard, seed]) for seed in own]
    if not runs:
        raise ConfigurationError(
            f"{visible(run_dir)} holds no run: a demo run has folders such as plain/seed-0. "
            "Give the folder that `hf-pss demo` wrote. For your own run: hf-pss watch RUN, "
            "or after a spike that PSS saw: hf-pss rescue RUN --html FILE.html."
        )
    return RunDirectory(
        info=info,
        guards=tuple(dict.fromkeys(run.guard for run in runs)),
        runs=tuple(runs),
        missing=tuple(reader.missing),
    )


def _load_run(reader: _Reader, guard: str, seed: int, folder: Path) -> TrainingRun:
    metrics = reader.lines(folder / METRICS_FILE, parse_row)
    summary = reader.json(folder / SUMMARY_FILE)
    readings = reader.lines(folder / HEALTH_FILE, parse_reading)
    num_ranks = len({name for one in readings for name in one.matrices.get("stable_rank", ())})
    if num_ranks * len(readings) > _MOST_RANKS:
        reader.note(folder / HEALTH_FILE, "holds more stable ranks than can be drawn")
        readings = ()
    # A guard that noticed nothing writes no events. A step may have several events,
    # one per detector.
    records = reader.lines(folder / EVENTS_FILE, parse_record, is_optional=True)
    return TrainingRun(
        guard=guard,
        seed=seed,
        **{name: _curve(metrics, name) for name in _CURVES},
        stable_ranks=_stable_ranks(readings),
        events=tuple(sorted(records, key=lambda record: event_of(record).step)),
        summary=summary,
    )


def _curve(rows: Iterable[JsonObject], key: str) -> Curve:
    # A resumed run writes some steps twice. The later line is valid.
    points = {
        step: number(row[key])
        for row in rows
        if key in row and (step := _count(row.get("step"))) is not None
    }
    steps = sorted(points)
    return Curve(
        np.array(steps, dtype=np.float64),
        np.array([points[step] for step in steps], dtype=np.float64),
    )


def _stable_ranks(readings: Iterable[HealthReading]) -> StableRanks:
    points = {
        one.step: one.matrices["stable_rank"] for one in readings if "stable_rank" in one.matrices
    }
    steps = sorted(points)
    names = tuple(dict.fromkeys(name for step in steps for name in points[step]))
    values = [[number(points[step].get(name)) for name in names] for step in steps]
    return StableRanks(
        np.array(steps, dtype=np.float64),
        names,
        np.array(values, dtype=np.float64).reshape(len(steps), len(names)),
    )


def _count(value: object) -> int | None:
    found = number(value)
    return int(found) if 0 <= found <= _MOST_STEPS else None


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
