"""One training step as plain numbers: its state while it runs, its report, and its health."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import InterventionHistory
from hf_pss.records.events import Event, Record


@dataclass(frozen=True, slots=True)
class HealthReading:
    """The health metrics of one step. A number that is NaN or inf marks a broken matrix."""

    step: int
    """The number of optimizer steps so far."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """One number for the whole model by the name of a metric, or by metric and summary:
    ``stable_rank/min``."""
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each metric by name, one number for each matrix by name."""
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values by the name of the matrix, descending, at the steps that sample them."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """The verdict of PSS on one step, and its actions."""

    step: int
    verdict: Verdict
    update_applied: bool
    records: tuple[Record, ...]
    """Events and interventions, in the order in which they happened."""
    scalars: Mapping[str, float]
    """Finite numbers for the log. Numbers that are not finite or not yet defined are left out."""
    is_in_trouble: bool
    """Whether this step spiked or was not finite. A stable rank below its floor does not count."""
    stable_ranks: Mapping[str, float] | None
    """The stable rank of every matrix, every ``health_every_steps``. None with ``health``."""
    health: HealthReading | None = None
    """The metrics that ``health`` asks for. They describe the weights before smoothing."""


@dataclass(slots=True)
class Step:
    """The current step, from before its update until its report."""

    number: int
    loss: float | None = None
    grad_norm_preclip: float | None = None
    update_applied: bool = True
    is_discarded: bool = False
    """Whether a different library dropped the update before this step was judged."""
    last_intervention_step: int | None = None
    """The step of the last intervention, before this step, of detectors that share the cooldown."""
    is_after_update: bool = False
    judgements: list[Judgement] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    to_smooth: list[tuple[Event, Judgement]] = field(default_factory=list)
    """The events to which PSS responds by smoothing when the update is done, in this order."""

    @property
    def is_in_trouble(self) -> bool:
        """See `StepReport`."""
        return any(
            judgement.verdict is Verdict.NON_FINITE
            or (judgement.verdict is Verdict.SPIKE and judgement.detector != "stable_rank_floor")
            for judgement in self.judgements
        )

    def is_due(self, every_steps: int) -> bool:
        """Return whether something with this interval is due now. 0 means never."""
        return every_steps > 0 and self.number % every_steps == 0

    def report(
        self,
        history: InterventionHistory,
        *,
        seconds: float,
        stable_ranks: Mapping[str, float] | None,
        health: HealthReading | None = None,
        health_seconds: float | None = None,
    ) -> StepReport:
        """Return the report of this step, given the policy's history at its end."""
        numbers: dict[str, float | None] = {
            "grad_norm_preclip": self.grad_norm_preclip,
            "interventions": history.num_interventions,
            "nonfinite_steps": history.num_nonfinite_steps,
            "seconds": seconds,
            "health_seconds": health_seconds,
        }
        for judgement in self.judgements:
            if judgement.detector == "grad_norm_ratio":
                numbers |= {"baseline": judgement.baseline, "threshold": judgement.threshold}
        verdicts = (judgement.verdict for judgement in self.judgements)
        return StepReport(
            step=self.number,
            verdict=max(verdicts, key=list(Verdict).index, default=Verdict.NORMAL),
            update_applied=self.update_applied,
            records=tuple(self.records),
            scalars={
                name: float(number)
                for name, number in numbers.items()
                if number is not None and math.isfinite(number)
            },
            is_in_trouble=self.is_in_trouble,
            stable_ranks=stable_ranks,
            health=health,
        )
