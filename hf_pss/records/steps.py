"""What a look at a model's health found at one step: plain numbers, for whoever reports them.

One step of training: what is collected while it is under way, and the report at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_pss.detection import Judgement, Verdict, worst
from hf_pss.detection.policy import History
from hf_pss.records.events import Event, Record

__all__ = ["HealthReading", "Step", "StepReport"]


@dataclass(frozen=True, slots=True)
class HealthReading:
    """All that was measured at one step. Numbers may be NaN or inf: a broken matrix is news."""

    step: int
    """Optimizer steps done."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """One number for the whole model by a metric's name, or by metric and summary:
    ``stable_rank/min``."""
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By a metric's name, one number for each matrix by its name."""
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values in descending order by the matrix's name, at the steps that sample them."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What PSS saw and did in one step."""

    step: int
    verdict: Verdict
    update_applied: bool
    records: tuple[Record, ...]
    """Events and interventions, in the order in which they happened."""
    scalars: Mapping[str, float]
    """Finite numbers for the log; a number that is not finite, or not defined yet, is left out."""
    is_in_trouble: bool
    """Whether this step spiked or was not finite; a stable rank below its floor is neither."""
    stable_ranks: Mapping[str, float] | None
    """Every matrix's stable rank, at the rhythm of ``health_every_steps``; None with ``health``."""
    health: HealthReading | None = None
    """What ``health`` asks for, at its rhythm: of the weights before they were smoothed."""


@dataclass(slots=True)
class Step:
    """The step under way: what comes before the update leaves it for what comes after."""

    number: int
    loss: float | None = None
    grad_norm_preclip: float | None = None
    update_applied: bool = True
    is_discarded: bool = False
    """Whether the update was dropped by others before this step was judged."""
    last_intervention_step: int | None = None
    """Of the detectors that share the cooldown, before this step."""
    is_after_update: bool = False
    judgements: list[Judgement] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    answers: list[tuple[Event, Judgement]] = field(default_factory=list)
    """Events that must be answered by smoothing once the update is done, in this order."""

    @property
    def is_in_trouble(self) -> bool:
        """See `StepReport`."""
        return any(
            judgement.verdict is Verdict.NON_FINITE
            or (judgement.verdict is Verdict.SPIKE and judgement.detector != "stable_rank_floor")
            for judgement in self.judgements
        )

    def is_due(self, every_steps: int) -> bool:
        """Tell whether something of this rhythm happens now; 0 is never."""
        return every_steps > 0 and self.number % every_steps == 0

    def report(
        self,
        history: History,
        *,
        seconds: float,
        stable_ranks: Mapping[str, float] | None,
        health: HealthReading | None = None,
        health_seconds: float | None = None,
    ) -> StepReport:
        """Return what is said of this step, given what the run remembers at its end."""
        return StepReport(
            step=self.number,
            verdict=worst(self.judgements).verdict if self.judgements else Verdict.NORMAL,
            update_applied=self.update_applied,
            records=tuple(self.records),
            scalars=self._scalars(history, seconds, health_seconds),
            is_in_trouble=self.is_in_trouble,
            stable_ranks=stable_ranks,
            health=health,
        )

    def _scalars(
        self, history: History, seconds: float, health_seconds: float | None
    ) -> dict[str, float]:
        numbers: dict[str, float | None] = {
            "grad_norm_preclip": self.grad_norm_preclip,
            "interventions": history.num_interventions,
            "nonfinite_steps": history.num_nonfinite_steps,
            "seconds": seconds,
            "health_seconds": health_seconds,
        }
        for judgement in self.judgements:
            if judgement.detector == "grad_norm_ratio":
                numbers["baseline"] = judgement.baseline
                numbers["threshold"] = judgement.threshold
        return {k: float(v) for k, v in numbers.items() if v is not None and math.isfinite(v)}
