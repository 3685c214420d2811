"""Measure how early a recorded quantity warns of an explosion, and how often it warns falsely.

A rule is one series of a run's record and one detector. This module compares rules at an equal rate
of false alarms, because a rule that always warns also warns early. It never compares each rule at a
threshold that happens to suit that rule. Give it rows of unprotected runs: a guard that acts on the
warning hides the explosion.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.table import Table

from hf_pss.detection.detectors import (
    GLOBAL,
    Baseline,
    Detector,
    FloorDetector,
    Quantity,
    RatioDetector,
    Verdict,
)
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.rows import Row
from hf_pss.view.numbers import NOTHING
from hf_pss.view.tables import lean_table

__all__ = [
    "HORIZON_STEPS",
    "RULES",
    "LeadScore",
    "Record",
    "Score",
    "WarningRule",
    "at_equal_rate",
    "by_recipe",
    "departure_step",
    "lead_time",
    "record_of",
    "render_table",
    "score",
    "threshold_sweep",
    "warning_steps",
]

_BASELINE = Baseline(alpha=0.1, calibration_steps=20, patience_steps=50)


@dataclass(frozen=True, slots=True)
class WarningRule:
    """A series, the detector that reads it, and the thresholds to try."""

    series: str
    """A series of `hf_pss.evidence.probes.PROBED`, or ``loss``."""
    detector: Callable[[float], Detector]
    """Builds the detector for a threshold."""
    threshold: float
    """The published threshold; ours where none is published."""
    thresholds: tuple[float, ...]
    """The thresholds that a comparison tries, the most sensitive first."""
    description: str
    complement: bool = False
    """Whether the detector reads one minus the value, so that a floor acts as a ceiling."""


_AVERAGE: dict[str, Any] = {"alpha": 0.1, "calibration_steps": 20, "patience_steps": 50}


def _ratio(limit: float) -> Detector:
    # A controller routes readings by the quantity. Here the detector gets its series directly.
    return RatioDetector("ratio", Quantity.GRAD_NORM, limit, _BASELINE)


def _drop(drop: float) -> Detector:
    return RatioDetector("drop", Quantity.STABLE_RANK, 1 - drop, _BASELINE)


def _floor(floor: float) -> Detector:
    return FloorDetector({GLOBAL: floor})


_RATIOS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)
_DROPS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_RANKS = (24.0, 20.0, 16.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.1)
_SHARES = (*(round(0.95 - 0.05 * i, 2) for i in range(19)), 0.02, 0.01)


RULES: Mapping[str, WarningRule] = MappingProxyType(
    {
        "loss_ratio": WarningRule(
            "loss", _ratio, 1.2, _RATIOS, "the loss itself, which a warning has to precede"
        ),
        "grad_norm_ratio": WarningRule(
            "grad_norm_preclip", _ratio, 2.5, _RATIOS, "the published trigger (arXiv 2602.01308)"
        ),
        "update_norm_ratio": WarningRule(
            "update_norm", _ratio, 2.5, _RATIOS, "the same on the update norm; ours"
        ),
        "min_stable_rank_drop": WarningRule(
            "min_stable_rank", _drop, 0.5, _DROPS, "the worst matrix against its recent past; ours"
        ),
        "mean_stable_rank_drop": WarningRule(
            "mean_stable_rank", _drop, 0.2, _DROPS, "the mean against its recent past; ours"
        ),
        "min_stable_rank_floor": WarningRule(
            "min_stable_rank", _floor, 2.0, _RANKS, "the worst matrix against a fixed floor; ours"
        ),
        "mean_stable_rank_floor": WarningRule(
            "mean_stable_rank", _floor, 4.0, _RANKS, "the mean against a fixed floor; ours"
        ),
        "jacobian_energy_level": WarningRule(
            "max_jacobian_energy",
            _floor,
            0.2,
            _SHARES,
            "SJE above 0.8, seen in explosions (arXiv 2602.01308): 1 − SJE below 0.2",
            complement=True,
        ),
        "jacobian_energy_ratio": WarningRule(
            "mean_jacobian_energy", _ratio, 2.5, _RATIOS, "mean SJE against its past; ours"
        ),
        "sign_diversity_floor": WarningRule(
            "mean_sign_diversity",
            _floor,
            0.2,
            _SHARES,
            "collapse of sign diversity (arXiv 2510.04202); number and threshold are ours",
        ),
        "sign_diversity_drop": WarningRule(
            "mean_sign_diversity", _drop, 0.5, _DROPS, "the same against its recent past; ours"
        ),
        "spectral_growth_ratio": WarningRule(
            "max_spectral_growth", _ratio, 1.2, _RATIOS, "σ₁ against its recent past; ours"
        ),
    }
)
"""The rules. Ratios and drops compare with a moving average (α = 0.1) of at least 20 readings."""


@dataclass(frozen=True, slots=True)
class Record:
    """One series of one run. A value is None where the reading was not finite."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def record_of(row: Row, series: str) -> Record | None:
    """Return a series of a row's probes, health or losses; None if it was not recorded.

    A series without any number counts as not recorded, not as non-finite at every step.

    Raises:
        ConfigurationError: The series and its steps are of different lengths.
    """
    steps, values = tuple(range(1, len(row.losses) + 1)), tuple(row.losses)
    if series != "loss":
        sources = (row.extra.get("probes") or {}, row.extra.get("health") or {})
        held = next((source for source in sources if series in source), {})
        steps, values = tuple(held.get("step", ())), tuple(held.get(series, ()))
        if held and len(steps) != len(values):
            raise ConfigurationError(
                f"Row {row.id} holds {len(values)} values of {series!r} for {len(steps)} steps; "
                "store the results of Probes.to_dict and read_health_series unchanged."
            )
    return Record(steps, values) if any(value is not None for value in values) else None


def warning_steps(
    rule: WarningRule, record: Record, *, threshold: float | None = None
) -> tuple[int, ...]:
    """Return the steps at which the rule warns. A reading that is not finite always warns.

    Args:
        rule: The rule to apply.
        record: The series to judge.
        threshold: Replaces the rule's own.
    """
    detector = rule.detector(rule.threshold if threshold is None else threshold)
    warned = []
    for step, value in zip(record.steps, record.values, strict=True):
        reading = math.nan if value is None else value
        if rule.complement:
            reading = max(1 - reading, 0.0) if math.isfinite(reading) else reading
        judgement = detector.judge({GLOBAL: reading})
        if judgement.verdict in (Verdict.SPIKE, Verdict.NON_FINITE):
            warned.append(step)
    return tuple(warned)


HORIZON_STEPS = 200
"""A warning counts if the loss departs within this many steps."""
MARGIN_NATS = 0.1
"""The loss has departed when it is this far above its minimum."""
WINDOW_STEPS = 9
"""Width of the centred median that removes batch noise from the loss; it does not lag."""


def departure_step(losses: Sequence[float | None], explosion_step: int) -> int:
    """Return the step at which the loss leaves its minimum for good.

    Let L̄_t be the centred median of `WINDOW_STEPS` losses up to the explosion e. The loss departs
    one step after the last t ≤ e with L̄_t ≤ min_{s ≤ e} L̄_s + `MARGIN_NATS`, and at e at the
    latest. So the loss of a run that stays on a plateau, or that one NaN breaks, departs at the
    explosion. A loss that is not finite counts as infinite.

    Args:
        losses: From step 1; None where not finite.
        explosion_step: The step of the explosion, as `find_explosion` returns it.

    Raises:
        ConfigurationError: `explosion_step` is outside of the losses.

    >>> departure_step([3.0] * 10 + [4.0] * 10, 20)
    11
    """
    if not 1 <= explosion_step <= len(losses):
        raise ConfigurationError(
            f"You gave the explosion step {explosion_step} for {len(losses)} losses; give a step "
            f"from 1 to {len(losses)}."
        )
    level = [
        math.inf if value is None or not math.isfinite(value) else value
        for value in losses[:explosion_step]
    ]
    half = WINDOW_STEPS // 2
    smooth = [
        statistics.median_low(level[max(0, i - half) : i + half + 1]) for i in range(len(level))
    ]
    limit = min(smooth) + MARGIN_NATS
    near = (t for t, value in enumerate(smooth, start=1) if math.isfinite(value) and value <= limit)
    last = max(near, default=0)
    return min(last + 1, explosion_step)


def lead_time(
    losses: Sequence[float | None],
    warnings: Sequence[int],
    explosion_step: int,
    *,
    horizon_steps: int = HORIZON_STEPS,
) -> int | None:
    """Return the steps from the first warning to the loss's departure.

    Args:
        losses: From step 1; None where not finite.
        warnings: Steps, as `warning_steps` returns them.
        explosion_step: The step of the explosion, as `find_explosion` returns it.
        horizon_steps: Warnings earlier than this before the departure do not count.

    Returns:
        The lead in steps. It is negative if the loss departed first, and None if no warning counts.

    >>> lead_time([3.0] * 10 + [4.0] * 10, [7, 12], 20)
    4
    """
    departure = departure_step(losses, explosion_step)
    counted = (w for w in warnings if departure - horizon_steps <= w <= explosion_step)
    first = min(counted, default=None)
    return None if first is None else departure - first


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadScore:
    """Warnings before explosions and false alarms in healthy runs, for one group of runs."""

    recipe: str
    leads: tuple[int | None, ...]
    """For each explosion, the steps from the warning to the loss's departure; None
    without a warning."""
    num_false_alarms: int
    """Number of readings of healthy runs that warned. A rule that always warns pays for
    every one of them."""
    num_healthy_readings: int

    @property
    def num_ahead(self) -> int:
        """Number of explosions with a warning before the loss departed."""
        return sum(lead is not None and lead > 0 for lead in self.leads)

    @property
    def median_lead(self) -> float | None:
        """The median over all explosions with a warning, including late ones."""
        known = [lead for lead in self.leads if lead is not None]
        return statistics.median(known) if known else None

    @property
    def false_alarm_rate(self) -> float | None:
        """False alarms per 1,000 readings of healthy runs."""
        if not self.num_healthy_readings:
            return None
        return 1000 * self.num_false_alarms / self.num_healthy_readings

    def cells(self) -> tuple[str, str, str]:
        """Return the cells of a table: explosions warned of early, leads, false-alarm rate."""
        known = [lead for lead in self.leads if lead is not None]
        rate = self.false_alarm_rate
        return (
            f"{self.num_ahead} of {len(self.leads)}" if self.leads else NOTHING,
            f"{self.median_lead:g} ({min(known)}…{max(known)})" if known else NOTHING,
            NOTHING if rate is None else f"{rate:.2g}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(LeadScore):
    """The score of one rule at one threshold over the runs of one recipe, or of all recipes."""

    rule: str
    threshold: float


def score(
    name: str,
    rows: Iterable[Row],
    *,
    threshold: float | None = None,
    recipe: str = "all",
    horizon_steps: int = HORIZON_STEPS,
) -> Score:
    """Judge one rule over the rows that recorded its series.

    A run counts as healthy if it finished and never met its recipe's definition of an explosion.

    Args:
        name: A key of `RULES`.
        rows: Unprotected runs.
        threshold: Replaces the rule's own.
        recipe: The name of the score.
        horizon_steps: See `lead_time`.

    Raises:
        ConfigurationError: The rule is unknown, or a row is damaged.
    """
    if name not in RULES:
        raise ConfigurationError(f"There is no rule {name!r}; choose one of {', '.join(RULES)}.")
    rule = RULES[name]
    level = rule.threshold if threshold is None else threshold
    leads: list[int | None] = []
    false_alarms = readings = 0
    for row in rows:
        record = record_of(row, rule.series)
        if record is None:
            continue
        warned = warning_steps(rule, record, threshold=level)
        if row.explosion_step is not None:
            lead = lead_time(row.losses, warned, row.explosion_step, horizon_steps=horizon_steps)
            leads.append(lead)
        elif row.status == "finished":
            false_alarms += len(warned)
            readings += len(record.steps)
    return Score(
        rule=name,
        recipe=recipe,
        threshold=level,
        leads=tuple(leads),
        num_false_alarms=false_alarms,
        num_healthy_readings=readings,
    )


def threshold_sweep(name: str, rows: Sequence[Row]) -> tuple[Score, ...]:
    """Judge a rule over all rows at each of its thresholds, the most sensitive first.

    Raises:
        ConfigurationError: The rule is unknown, or a row is damaged.
    """
    thresholds = RULES[name].thresholds if name in RULES else (0.0,)
    return tuple(score(name, rows, threshold=threshold) for threshold in thresholds)


def at_equal_rate(
    rows: Sequence[Row], *, max_false_alarms: float, rules: Sequence[str] = tuple(RULES)
) -> tuple[Score, ...]:
    """Return a score per rule and recipe, at the most sensitive threshold within one alarm rate.

    A rule has one threshold over all recipes, because nobody knows beforehand which explosion will
    come. The threshold is chosen on the same healthy runs whose rate is reported, so expect a
    slightly higher rate in new runs.

    Args:
        rows: Unprotected runs.
        max_false_alarms: The most false alarms per 1,000 readings of all healthy runs together.
        rules: Names of rules. A rule is left out if none of its thresholds keeps the rate, or if no
            healthy run recorded its series.

    Raises:
        ConfigurationError: A rule is unknown, or a row is damaged.
    """
    found: list[Score] = []
    for name in rules:
        for one in threshold_sweep(name, rows):
            if one.false_alarm_rate is not None and one.false_alarm_rate <= max_false_alarms:
                found += by_recipe(name, rows, threshold=one.threshold)
                break
    return tuple(found)


def by_recipe(
    name: str, rows: Sequence[Row], *, threshold: float | None = None
) -> tuple[Score, ...]:
    """Judge a rule over the rows of each recipe that has an explosion or a healthy run.

    Raises:
        ConfigurationError: The rule is unknown, or a row is damaged.
    """
    scores = (
        score(name, [r for r in rows if r.recipe == recipe], threshold=threshold, recipe=recipe)
        for recipe in sorted({row.recipe for row in rows})
    )
    return tuple(s for s in scores if s.leads or s.num_healthy_readings)


def render_table(scores: Sequence[Score]) -> Table:
    """Return the scores as a table for the terminal."""
    return lean_table(
        ["rule", "recipe"],
        ["threshold", "warned\nahead", "lead,\nsteps", "false\n/1,000", "healthy"],
        rows=(
            (
                one.rule,
                one.recipe,
                f"{one.threshold:g}",
                *one.cells(),
                str(one.num_healthy_readings),
            )
            for one in scores
        ),
    )
