"""What a run directory holds, as frozen records; a number that is not there is NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    """Stable rank of every watched matrix over time; NaN where a row does not name the matrix."""

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
    """Everything that one guard left behind with one seed."""

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
        """The events that were answered by smoothing which changed a weight."""
        return tuple(event for event in self.events if event.is_intervention and event.changed)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory: ``run.json``, the runs below it, and what was looked for and not found."""

    info: Row
    guards: tuple[str, ...]
    runs: tuple[TrainingRun, ...]
    missing: tuple[str, ...]

    @property
    def status(self) -> str:
        """``finished``, ``interrupted``, ``failed``; ``unknown`` where ``run.json`` is silent."""
        return str(self.info.get("status", "unknown"))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that left something, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def reference(self) -> str:
        """The guard the others are measured against: ``plain``, or the first."""
        return "plain" if "plain" in self.guards else self.guards[0]

    def of(self, guard: str) -> tuple[TrainingRun, ...]:
        """The runs of one guard, by seed."""
        return tuple(run for run in self.runs if run.guard == guard)

    def section(self, name: str) -> Row:
        """A table of ``run.json``; empty where it is not there or no table."""
        value = self.info.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def elapsed_seconds(self) -> float:
        """Wall-clock time of all runs together; NaN where unknown."""
        return number(self.info.get("elapsed_seconds"))

    @property
    def unigram_entropy_nats(self) -> float:
        """Loss of a model that knows only the token frequencies; NaN where unknown."""
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
