"""Scores of rules or metrics as a table for the terminal.

What may warn of an explosion: one series of a run's record, and the detector that reads it.

How early a recorded quantity warns of an explosion, and how often it warns of nothing.

A rule is one series of a run's record and one detector. Rules are compared at an equal rate of
false alarms, never each at a threshold that happens to suit it: any rule warns early that warns
always. Give rows of runs that nobody protected: a guard that acts on the warning hides what was
warned of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.table import Table
from rich.text import Text

from hf_pss.detection import (
    GLOBAL,
    Baseline,
    Detector,
    DropDetector,
    FloorDetector,
    Quantity,
    RatioDetector,
    Verdict,
)
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.rows import Row
from hf_pss.records.strict_json import visible

__all__ = [
    "HORIZON_STEPS",
    "RULES",
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
    "score_table",
    "threshold_sweep",
    "warning_steps",
]

_NUM_NAMES = 2


def score_table(columns: Sequence[str], lines: Iterable[Iterable[str]]) -> Table:
    """Return a table whose first two columns are names, and all others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        is_name = number < _NUM_NAMES
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for line in lines:
        # `Text`, because a name in square brackets would be taken for rich's markup.
        table.add_row(*(Text(visible(cell)) for cell in line))
    return table


_BASELINE = Baseline(alpha=0.1, calibration_steps=20, patience_steps=50)


@dataclass(frozen=True, slots=True)
class WarningRule:
    """One series, the detector that reads it, and the thresholds that a sweep tries."""

    series: str
    """A series of `hf_pss.evidence.probes.PROBED`, or ``loss``."""
    detector: Callable[[float], Detector]
    """Builds the detector of a threshold."""
    threshold: float
    """The published one, or ours."""
    thresholds: tuple[float, ...]
    """For a sweep, the most sensitive first."""
    description: str
    complement: bool = False
    """Whether one minus the value is read: a floor on it is a ceiling on the value."""


def _ratio(limit: float) -> Detector:
    # The quantity only routes readings in a controller; here the series is handed over directly.
    return RatioDetector(Quantity.GRAD_NORM, limit, _BASELINE)


def _drop(drop: float) -> Detector:
    return DropDetector(drop, _BASELINE)


def _floor(floor: float) -> Detector:
    return FloorDetector({GLOBAL: floor})


_RATIOS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0)
_DROPS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_RANKS = (24.0, 20.0, 16.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.1)
_SHARES = (*(round(0.95 - 0.05 * i, 2) for i in range(19)), 0.02, 0.01)


RULES: Mapping[str, WarningRule] = MappingProxyType(
    {
        "loss_ratio": WarningRule(
            "loss", _ratio, 1.2, _RATIOS, "the loss itself: what a warning has to be ahead of"
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
"""The rules; ratios and drops refer to an average with α = 0.1, after 20 readings."""


@dataclass(frozen=True, slots=True)
class Record:
    """One series of one run: a value a step; None is a reading that was not finite."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def record_of(row: Row, series: str) -> Record | None:
    """Return a series of a row: of its probes, its health or its losses; None where it has not it.

    A series without one number counts as not recorded, not as broken at every step.

    Raises:
        ConfigurationError: The series and its steps are of different lengths.
    """
    if series == "loss":
        steps, values = tuple(range(1, len(row.losses) + 1)), tuple(row.losses)
    else:
        held = next((h for h in _records_of(row) if series in h), {})
        steps, values = tuple(held.get("step", ())), tuple(held.get(series, ()))
        if held and len(steps) != len(values):
            raise ConfigurationError(
                f"Row {row.id} holds {len(values)} values of {series!r} for {len(steps)} steps; "
                "store what Probes.to_dict or read_health_series returns, unchanged."
            )
    known = any(value is not None for value in values)
    return Record(steps, values) if known else None


def _records_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    return row.extra.get("probes") or {}, row.extra.get("health") or {}


def warning_steps(
    rule: WarningRule, record: Record, *, threshold: float | None = None
) -> tuple[int, ...]:
    """Return the steps at which the rule warns; a reading that is not finite warns by itself.

    Args:
        rule: What to judge with.
        record: What to judge.
        threshold: In place of the rule's own.
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
"""A warning counts for an explosion from so many steps before the loss departs."""
MARGIN_NATS = 0.1
"""The loss has left its minimum when it is so far above it."""
WINDOW_STEPS = 9
"""Of the centred median that takes batch noise out of the loss; no lag, unlike a trailing one."""


def departure_step(losses: Sequence[float | None], explosion_step: int) -> int:
    """Return the step at which the loss leaves its minimum for good.

    With L̄_t the centred median of `WINDOW_STEPS` losses up to the explosion e, it is one more than
    the last t ≤ e with L̄_t ≤ min_{s ≤ e} L̄_s + `MARGIN_NATS`, and at most e: a run that stays at a
    plateau, or breaks at one NaN, departs when its explosion is met. A loss that is not finite is
    infinite.

    Args:
        losses: From step 1; None where not finite.
        explosion_step: Where the explosion's definition is met.

    Raises:
        ConfigurationError: `explosion_step` is no step of the losses.

    >>> departure_step([3.0] * 10 + [4.0] * 10, 20)
    11
    """
    if not 1 <= explosion_step <= len(losses):
        raise ConfigurationError(
            f"You gave the explosion step {explosion_step} of {len(losses)} losses; give one of "
            "them, counted from 1."
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
    """Return the steps between the first warning and the loss's departure.

    Args:
        losses: From step 1; None where not finite.
        warnings: Steps, as `warning_steps` returns them.
        explosion_step: Where the explosion's definition is met.
        horizon_steps: A warning longer than this before the departure is not of this explosion.

    Returns:
        Negative where the loss departed first; None without a warning from the horizon up to the
        explosion.

    >>> lead_time([3.0] * 10 + [4.0] * 10, [7, 12], 20)
    4
    """
    departure = departure_step(losses, explosion_step)
    counted = (w for w in warnings if departure - horizon_steps <= w <= explosion_step)
    first = min(counted, default=None)
    return None if first is None else departure - first


@dataclass(frozen=True, slots=True)
class Score:
    """What one rule, at one threshold, did over the runs of one recipe (or of all)."""

    rule: str
    recipe: str
    threshold: float
    leads: tuple[int | None, ...]
    """One an explosion, in steps; None where nothing warned."""
    num_false_alarms: int
    """Readings that warned in runs without explosion: one that warns always pays for each."""
    num_healthy_readings: int

    @property
    def warned_ahead(self) -> tuple[int, ...]:
        """The leads of explosions that were warned of before the loss departed."""
        return tuple(lead for lead in self.leads if lead is not None and lead > 0)

    @property
    def share_warned(self) -> float | None:
        """Of the explosions, those warned of before the loss departed."""
        return len(self.warned_ahead) / len(self.leads) if self.leads else None

    @property
    def median_lead(self) -> float | None:
        """Over all explosions that a warning came for, late ones too."""
        known = [lead for lead in self.leads if lead is not None]
        return statistics.median(known) if known else None

    @property
    def false_alarm_rate(self) -> float | None:
        """Per 1,000 readings of runs without explosion."""
        if not self.num_healthy_readings:
            return None
        return 1000 * self.num_false_alarms / self.num_healthy_readings


def score(
    name: str,
    rows: Iterable[Row],
    *,
    threshold: float | None = None,
    recipe: str = "all",
    horizon_steps: int = HORIZON_STEPS,
) -> Score:
    """Judge one rule over rows; those that did not record its series count for nothing.

    A run is healthy when it finished and never met its recipe's definition of an explosion.

    Args:
        name: Of a row of `RULES`.
        rows: Runs that nobody protected.
        threshold: In place of the rule's own.
        recipe: What the score is called.
        horizon_steps: See `lead_time`.

    Raises:
        ConfigurationError: No such rule, or a row is damaged.
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
    return Score(name, recipe, level, tuple(leads), false_alarms, readings)


def threshold_sweep(name: str, rows: Sequence[Row]) -> tuple[Score, ...]:
    """Judge a rule over all rows at each threshold of its grid, the most sensitive first.

    Raises:
        ConfigurationError: No such rule, or a row is damaged.
    """
    thresholds = RULES[name].thresholds if name in RULES else (0.0,)
    return tuple(score(name, rows, threshold=threshold) for threshold in thresholds)


def at_equal_rate(
    rows: Sequence[Row], *, max_false_alarms: float, rules: Sequence[str] = tuple(RULES)
) -> tuple[Score, ...]:
    """Return rule × recipe, each rule at its most sensitive threshold within one rate.

    One threshold a rule, over all recipes: nobody knows beforehand which explosion will come. It is
    chosen on the same healthy runs that the rate is reported of; new runs will show a little more.

    Args:
        rows: Runs that nobody protected.
        max_false_alarms: Per 1,000 readings of all healthy runs together.
        rules: Names; a rule that no threshold of its grid keeps within the rate is left out, and so
            is one whose series was recorded in no healthy run.

    Raises:
        ConfigurationError: No such rule, or a row is damaged.
    """
    found: list[Score] = []
    for name in rules:
        allowed = (
            s.threshold
            for s in threshold_sweep(name, rows)
            if s.false_alarm_rate is not None and s.false_alarm_rate <= max_false_alarms
        )
        threshold = next(allowed, None)
        if threshold is not None:
            found += by_recipe(name, rows, threshold=threshold)
    return tuple(found)


def by_recipe(
    name: str, rows: Sequence[Row], *, threshold: float | None = None
) -> tuple[Score, ...]:
    """Judge a rule over the rows of each recipe that has an explosion or a healthy run.

    Raises:
        ConfigurationError: No such rule, or a row is damaged.
    """
    recipes = sorted({row.recipe for row in rows})
    scores = (
        score(name, [r for r in rows if r.recipe == recipe], threshold=threshold, recipe=recipe)
        for recipe in recipes
    )
    return tuple(s for s in scores if s.leads or s.num_healthy_readings)


_COLUMNS = (
    "rule",
    "recipe",
    "threshold",
    "warned ahead",
    "lead, steps",
    "false /1,000",
    "healthy",
)


def render_table(scores: Sequence[Score]) -> Table:
    """Return the scores as a table for the terminal."""
    return score_table(_COLUMNS, map(_cells, scores))


def _cells(line: Score) -> tuple[str, ...]:
    known = [lead for lead in line.leads if lead is not None]
    rate = line.false_alarm_rate
    return (
        line.rule,
        line.recipe,
        f"{line.threshold:g}",
        f"{len(line.warned_ahead)} of {len(line.leads)}" if line.leads else "–",
        f"{line.median_lead:g} ({min(known)}…{max(known)})" if known else "–",
        "–" if rate is None else f"{rate:.2g}",
        str(line.num_healthy_readings),
    )
