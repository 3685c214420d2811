"""Measure how early a recorded quantity warns of an explosion, and how often it warns falsely.

A rule is one series of a run's record and one detector. This module compares rules at an equal rate
of false alarms, because a rule that always warns also warns early. It never compares each rule at a
threshold that happens to suit that rule. Give it rows of unprotected runs: a guard that acts on the
warning hides the explosion.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

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

_BASELINE = Baseline(alpha=0.1, calibration_steps=20, patience_steps=50)


@dataclass(frozen=True, slots=True)
class WarningRule:
    """A series, the detector that reads it, and the thresholds to try."""

    series: str
    """A series of `hf_pss.evidence.probes.PROBED`, or ``loss``."""
    detector: Callable[[float], Detector]
    """Builds the detector for a threshold."""
    thresholds: tuple[float, ...]
    """The thresholds that a comparison tries, the most sensitive first."""
    complement: bool = False
    """Whether the detector reads one minus the value, so that a floor acts as a ceiling."""


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
        # The loss itself, which a warning has to precede.
        "loss_ratio": WarningRule("loss", _ratio, _RATIOS),
        # The published trigger, with a threshold of 2.5 (arXiv 2602.01308).
        "grad_norm_ratio": WarningRule("grad_norm_preclip", _ratio, _RATIOS),
        # The rules without a source are ours.
        "update_norm_ratio": WarningRule("update_norm", _ratio, _RATIOS),
        # The worst matrix and the mean, against their recent past or against a fixed floor.
        "min_stable_rank_drop": WarningRule("min_stable_rank", _drop, _DROPS),
        "mean_stable_rank_drop": WarningRule("mean_stable_rank", _drop, _DROPS),
        "min_stable_rank_floor": WarningRule("min_stable_rank", _floor, _RANKS),
        "mean_stable_rank_floor": WarningRule("mean_stable_rank", _floor, _RANKS),
        # Explosions had an SJE above 0.8 (arXiv 2602.01308): 1 − SJE is below 0.2.
        "jacobian_energy_level": WarningRule(
            "max_jacobian_energy", _floor, _SHARES, complement=True
        ),
        "jacobian_energy_ratio": WarningRule("mean_jacobian_energy", _ratio, _RATIOS),
        # The collapse of sign diversity (arXiv 2510.04202). The number and the threshold are ours.
        "sign_diversity_floor": WarningRule("mean_sign_diversity", _floor, _SHARES),
        "sign_diversity_drop": WarningRule("mean_sign_diversity", _drop, _DROPS),
        "spectral_growth_ratio": WarningRule("max_spectral_growth", _ratio, _RATIOS),
    }
)
"""The rules. Ratios and drops compare with a moving average (α = 0.1) of at least 20 readings."""

Record = dict[int, float | None]
"""One series of one run, by step. A value is None where the reading was not finite."""


def record_of(row: Row, series: str) -> Record:
    """Return a series of a row's probes, health or losses; empty if it was not recorded.

    A series without any number counts as not recorded, not as non-finite at every step.

    Raises:
        ConfigurationError: The series and its steps are of different lengths.
    """
    steps, values = range(1, len(row.losses) + 1), row.losses
    if series != "loss":
        sources = (row.extra.get("probes") or {}, row.extra.get("health") or {})
        held = next((source for source in sources if series in source), {})
        steps, values = held.get("step", ()), held.get(series, ())
        if len(steps) != len(values) and held:
            raise ConfigurationError(
                f"Row {row.id} holds {len(values)} values of {series!r} for {len(steps)} steps; "
                "store the results of Probes.to_dict and read_health_series unchanged."
            )
    has_number = any(value is not None for value in values)
    return dict(zip(steps, values, strict=True)) if has_number else {}


def warning_steps(rule: WarningRule, record: Record, threshold: float) -> list[int]:
    """Return the steps at which the rule warns. A reading that is not finite always warns."""
    detector = rule.detector(threshold)
    warned = []
    for step, value in record.items():
        reading = math.nan if value is None else value
        if rule.complement:
            reading = max(1 - reading, 0.0) if math.isfinite(reading) else reading
        judgement = detector.judge({GLOBAL: reading})
        if judgement.verdict in (Verdict.SPIKE, Verdict.NON_FINITE):
            warned.append(step)
    return warned


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
    warnings: Iterable[int],
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
        The lead in steps, negative if the loss departed first, or None if no warning counts.

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

    name: str
    """The rule or the metric."""
    recipe: str
    threshold: float
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


AnyScore = TypeVar("AnyScore", bound=LeadScore)


def most_sensitive(
    candidates: Iterable[Collection[AnyScore]], max_false_alarms: float
) -> list[AnyScore]:
    """Return the first scores that keep one rate of false alarms over all groups together.

    A group without an explosion and without a healthy reading is left out.

    Args:
        candidates: The scores of all groups at one threshold, for thresholds in the order of
            their sensitivity. The result is empty if none of them keeps the rate.
        max_false_alarms: The most false alarms per 1,000 readings of healthy runs.
    """
    for scores in candidates:
        readings = sum(one.num_healthy_readings for one in scores)
        alarms = sum(one.num_false_alarms for one in scores)
        if readings and 1000 * alarms <= max_false_alarms * readings:
            return [one for one in scores if one.leads or one.num_healthy_readings]
    return []


def score(name: str, rows: Iterable[Row], threshold: float, *, recipe: str) -> LeadScore:
    """Judge one rule over the rows of a recipe that recorded its series.

    A run counts as healthy if it finished and never met its recipe's definition of an explosion.

    Raises:
        ConfigurationError: A row is damaged.
    """
    rule = RULES[name]
    leads: list[int | None] = []
    false_alarms = readings = 0
    for row in rows:
        if row.recipe != recipe or not (record := record_of(row, rule.series)):
            continue
        warned = warning_steps(rule, record, threshold)
        if row.explosion_step is not None:
            leads.append(lead_time(row.losses, warned, row.explosion_step))
        elif row.status == "finished":
            false_alarms += len(warned)
            readings += len(record)
    return LeadScore(
        name=name,
        recipe=recipe,
        threshold=threshold,
        leads=tuple(leads),
        num_false_alarms=false_alarms,
        num_healthy_readings=readings,
    )


def at_equal_rate(rows: Sequence[Row], *, max_false_alarms: float) -> list[LeadScore]:
    """Return a score per rule and recipe, at the most sensitive threshold within one alarm rate.

    A rule has one threshold over all recipes, because nobody knows beforehand which explosion will
    come. The threshold is chosen on the same healthy runs whose rate is reported, so expect a
    slightly higher rate in new runs. A rule is left out if none of its thresholds keeps the rate,
    or if no healthy run recorded its series.

    Args:
        rows: Unprotected runs.
        max_false_alarms: The most false alarms per 1,000 readings of all healthy runs together.

    Raises:
        ConfigurationError: A row is damaged.
    """
    recipes = sorted({row.recipe for row in rows})
    found: list[LeadScore] = []
    for name, rule in RULES.items():
        candidates = (
            [score(name, rows, threshold, recipe=recipe) for recipe in recipes]
            for threshold in rule.thresholds
        )
        found += most_sensitive(candidates, max_false_alarms)
    return found


def render_table(scores: Iterable[LeadScore]) -> Table:
    """Return the scores as a table for the terminal."""
    return lean_table(
        ["rule", "recipe"],
        ["threshold", "warned\nahead", "lead,\nsteps", "false\n/1,000", "healthy"],
        rows=(
            (
                one.name,
                one.recipe,
                f"{one.threshold:g}",
                *one.cells(),
                f"{one.num_healthy_readings}",
            )
            for one in scores
        ),
    )
