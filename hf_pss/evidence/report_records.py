"""What a run directory holds, as frozen records; a number that is not there is NaN.

Read a run directory as it lies there: complete, interrupted, or cut in the middle of a line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hf_pss.errors import ConfigurationError

__all__ = [
    "Curve",
    "Event",
    "Floats",
    "MatrixChange",
    "Row",
    "RunDirectory",
    "StableRanks",
    "Summary",
    "TrainingRun",
    "load_run_directory",
    "number",
]

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]

# Training computes in float32: what lies beyond has overflowed, and would overflow the axes.
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


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
    """Stable rank of every selected matrix over time; NaN where a row lacks the matrix."""

    steps: Floats
    names: tuple[str, ...]
    values: Floats
    """(num_steps, num_names)."""


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """What one intervention did to one matrix."""

    name: str
    shape: tuple[int, ...]
    status: str
    rank: int | None
    sigma_before: float
    sigma_after: float
    stable_rank_before: float
    stable_rank_after: float

    @property
    def changed(self) -> bool:
        """Whether σ₁ moved: a matrix that was looked at and skipped is listed too."""
        return self.sigma_after < self.sigma_before


@dataclass(frozen=True, slots=True)
class Event:
    """One line of ``pss_events.jsonl``: something was noticed, and smoothed or not."""

    step: int
    kind: str
    """``spike``, ``drop``, ``floor`` or ``non_finite``."""
    detector: str
    is_intervention: bool
    """Whether weights were smoothed; smoothing, seconds and matrices are an intervention's."""
    decision: str
    """``observe``, ``skip_update`` or ``stop``, where no weight was smoothed; ``undo``, where
    smoothing was taken back."""
    reason: str
    """Why it was decided so: ``cooldown``, ``budget``, ``observe only``."""
    smoothing: str
    value: float
    threshold: float
    seconds: float
    matrices: tuple[MatrixChange, ...]

    @property
    def answer(self) -> str:
        """What was done, in a few words."""
        if self.is_intervention:
            return f"{self.smoothing}, taken back" if self.decision == "undo" else self.smoothing
        if self.decision == "observe":
            return f"none ({self.reason})"
        return self.decision.replace("_", " ") or "none"

    @property
    def changed(self) -> tuple[MatrixChange, ...]:
        """The matrices that moved, the most singular first."""
        kept = () if self.decision == "undo" else self.matrices
        moved = [matrix for matrix in kept if matrix.changed]
        return tuple(sorted(moved, key=lambda matrix: matrix.stable_rank_before))


@dataclass(frozen=True, slots=True)
class Summary:
    """``summary.json``; NaN and None where it has no such entry."""

    status: str
    final_eval_loss: float
    final_train_loss: float
    train_seconds: float
    pss_seconds: float
    num_interventions: int | None
    num_events: int | None
    num_nonfinite_steps: int | None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end by itself."""
        return self.status == "finished"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """All records of the run of one guard and seed."""

    guard: str
    seed: int
    loss: Curve
    eval_loss: Curve
    grad_norm_preclip: Curve
    baseline: Curve
    threshold: Curve
    stable_ranks: StableRanks
    events: tuple[Event, ...]
    summary: Summary | None

    @property
    def interventions(self) -> tuple[Event, ...]:
        """The events whose smoothing changed a weight."""
        return tuple(event for event in self.events if event.is_intervention and event.changed)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory: ``run.json``, the runs below it, and a list of missing files."""

    info: Row
    guards: tuple[str, ...]
    runs: tuple[TrainingRun, ...]
    missing: tuple[str, ...]

    @property
    def status(self) -> str:
        """``finished``, ``interrupted`` or ``failed``; ``unknown`` where ``run.json`` lacks it."""
        return str(self.info.get("status", "unknown"))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed with a run, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def reference(self) -> str:
        """The guard that the others are compared with: ``plain``, or the first."""
        return "plain" if "plain" in self.guards else self.guards[0]

    def of(self, guard: str) -> tuple[TrainingRun, ...]:
        """The runs of one guard, by seed."""
        return tuple(run for run in self.runs if run.guard == guard)

    def section(self, name: str) -> Row:
        """A table of ``run.json``; empty where it is missing or of another type."""
        value = self.info.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def elapsed_seconds(self) -> float:
        """Wall-clock time of all runs together; NaN where unknown."""
        return number(self.info.get("elapsed_seconds"))

    @property
    def unigram_entropy_nats(self) -> float:
        """Loss of a model that predicts the token frequencies; NaN where unknown."""
        return number(self.info.get("unigram_entropy_nats"))


def number(value: object) -> float:
    """Read a JSON value as a number that float32 can hold; NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if abs(found) <= _LARGEST_FLOAT32 else math.nan


_SEED_FOLDER = re.compile(r"seed-(\d+)")
_EVENT_KINDS = {"spike", "drop", "floor", "non_finite", "intervention"}


_Folders: TypeAlias = Mapping[tuple[str, int], Path]


@dataclass(slots=True)
class _Reader:
    """Reads files below `root`, and notes what it could not read."""

    root: Path
    missing: list[str] = field(default_factory=list)

    def json(self, path: Path) -> Row | None:
        text = self._text(path)
        if text is None:
            return None
        row = _parse(text)
        if row is None:
            self._note(path, "cannot be read")
        return row

    def json_lines(self, path: Path) -> list[Row]:
        text = self._text(path)
        if text is None:
            return []
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [row for line in lines if (row := _parse(line)) is not None]
        if not lines:
            self._note(path, "is empty")
        elif num_lost := len(lines) - len(rows):
            self._note(path, f"has {num_lost} of {len(lines)} lines that cannot be read")
        return rows

    def _text(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            self._note(path, "is not there")
            return None

    def _note(self, path: Path, problem: str) -> None:
        self.missing.append(f"{path.relative_to(self.root).as_posix()} {problem}.")


def load_run_directory(run_dir: Path) -> RunDirectory:
    """Read what a demo run has written so far.

    Where ``run.json`` names its guards and seeds, folders of others are an earlier demo's: they are
    left out.

    Raises:
        ConfigurationError: no such folder, or nothing in it that a run would write.
    """
    if not run_dir.is_dir():
        raise ConfigurationError(f"There is no folder {run_dir}. Give the folder of a demo run.")
    reader = _Reader(run_dir)
    info = reader.json(run_dir / "run.json") or {}
    found = _run_folders(run_dir)
    guards = [str(guard) for guard in _sequence(info.get("guards"))]
    guards = guards or sorted({guard for guard, _ in found})
    seeds = {seed for value in _sequence(info.get("seeds")) if (seed := _count(value)) is not None}
    runs = tuple(
        run for guard in dict.fromkeys(guards) for run in _load_guard(reader, guard, seeds, found)
    )
    if not runs:
        raise ConfigurationError(
            f"{run_dir} holds no run: a demo run has folders such as plain/seed-0. Give the folder "
            "that `hf-pss demo` wrote; `hf-pss train` leaves its numbers in trainer_state.json."
        )
    return RunDirectory(
        info=info,
        guards=tuple(dict.fromkeys(run.guard for run in runs)),
        runs=runs,
        missing=tuple(reader.missing),
    )


def _run_folders(run_dir: Path) -> _Folders:
    return {
        (folder.parent.name, int(match[1])): folder
        for folder in run_dir.glob("*/seed-*")
        if folder.is_dir() and (match := _SEED_FOLDER.fullmatch(folder.name))
    }


def _load_guard(
    reader: _Reader, guard: str, seeds: AbstractSet[int], found: _Folders
) -> list[TrainingRun]:
    there = {
        seed: folder
        for (name, seed), folder in sorted(found.items())
        if name == guard and (seed in seeds or not seeds)
    }
    absent = [f"{guard}/seed-{seed}" for seed in sorted(seeds - set(there))] if there else [guard]
    reader.missing += [f"{name} has left nothing." for name in absent]
    return [_load_run(reader, guard, seed, folder) for seed, folder in there.items()]


def _load_run(reader: _Reader, guard: str, seed: int, folder: Path) -> TrainingRun:
    metrics = reader.json_lines(folder / "metrics.jsonl")
    summary = reader.json(folder / "summary.json")
    return TrainingRun(
        guard=guard,
        seed=seed,
        loss=_curve(metrics, "loss"),
        eval_loss=_curve(metrics, "eval_loss"),
        grad_norm_preclip=_curve(metrics, "grad_norm_preclip"),
        baseline=_curve(metrics, "baseline"),
        threshold=_curve(metrics, "threshold"),
        stable_ranks=_stable_ranks(reader.json_lines(folder / "pss_health.jsonl")),
        events=_events(folder, reader),
        summary=None if summary is None else _summary(summary),
    )


def _curve(rows: Iterable[Row], key: str) -> Curve:
    # A resumed run writes some steps twice; the later line is what happened.
    points = {step: number(row[key]) for row in rows if key in row and (step := _step(row)) >= 0}
    steps = sorted(points)
    return Curve(
        np.array(steps, dtype=np.float64),
        np.array([points[step] for step in steps], dtype=np.float64),
    )


def _stable_ranks(rows: Iterable[Row]) -> StableRanks:
    points: dict[int, Row] = {
        step: row["stable_rank"]
        for row in rows
        if isinstance(row.get("stable_rank"), Mapping) and (step := _step(row)) >= 0
    }
    steps = sorted(points)
    names = tuple(dict.fromkeys(str(name) for step in steps for name in points[step]))
    values = [[number(points[step].get(name)) for name in names] for step in steps]
    return StableRanks(
        np.array(steps, dtype=np.float64),
        names,
        np.array(values, dtype=np.float64).reshape(len(steps), len(names)),
    )


def _events(folder: Path, reader: _Reader) -> tuple[Event, ...]:
    path = folder / "pss_events.jsonl"
    # A guard that noticed nothing writes no events: neither absent nor empty is a loss.
    if not path.is_file() or path.stat().st_size == 0:
        return ()
    # All of them: a step may hold several, one for each detector.
    events = [_event(row) for row in reader.json_lines(path) if _kind(row) in _EVENT_KINDS]
    return tuple(sorted(events, key=lambda event: event.step))


def _kind(row: Row) -> str:
    return str(row.get("kind", ""))


def _event(row: Row) -> Event:
    is_intervention = _kind(row) == "intervention"
    matrices = [item for item in _sequence(row.get("matrices")) if isinstance(item, Mapping)]
    return Event(
        step=_step(row),
        kind=str(row.get("trigger", "")) if is_intervention else _kind(row),
        detector=str(row.get("detector", "")),
        is_intervention=is_intervention,
        decision=str(row.get("decision", "")),
        reason=str(row.get("reason", "")),
        smoothing=str(row.get("smoothing", "")),
        value=number(row.get("value")),
        threshold=number(row.get("threshold")),
        seconds=number(row.get("seconds")),
        matrices=tuple(_matrix_change(item) for item in matrices),
    )


def _matrix_change(item: Row) -> MatrixChange:
    return MatrixChange(
        name=str(item.get("name", "")),
        shape=tuple(size for size in map(_count, _sequence(item.get("shape"))) if size is not None),
        status=str(item.get("status", "")),
        rank=_count(item.get("rank")),
        sigma_before=number(item.get("sigma_before")),
        sigma_after=number(item.get("sigma_after")),
        stable_rank_before=number(item.get("stable_rank_before")),
        stable_rank_after=number(item.get("stable_rank_after")),
    )


def _summary(row: Row) -> Summary:
    return Summary(
        status=str(row.get("status", "unknown")),
        final_eval_loss=number(row.get("final_eval_loss")),
        final_train_loss=number(row.get("final_train_loss")),
        train_seconds=number(row.get("train_seconds")),
        pss_seconds=number(row.get("pss_seconds")),
        num_interventions=_count(row.get("num_interventions")),
        num_events=_count(row.get("num_events")),
        num_nonfinite_steps=_count(row.get("num_nonfinite_steps")),
    )


def _parse(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(value: object) -> int | None:
    found = number(value)
    return None if math.isnan(found) else int(found)


def _step(row: Row) -> int:
    step = _count(row.get("step"))
    return -1 if step is None else step


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
