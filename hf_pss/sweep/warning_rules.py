"""What may warn of an explosion: one series of a run's record, and the detector that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_pss.detection import (
    GLOBAL,
    Detector,
    DropDetector,
    FloorDetector,
    Quantity,
    RatioDetector,
    Verdict,
)
from hf_pss.errors import ConfigurationError
from hf_pss.sweep.rows import Row

__all__ = ["RULES", "Record", "WarningRule", "record_of", "warning_steps"]

_ALPHA = 0.1
_CALIBRATION_READINGS = 20
_PATIENCE_READINGS = 50


@dataclass(frozen=True, slots=True)
class WarningRule:
    """One series, the detector that reads it, and the thresholds that a sweep tries."""

    series: str
    """A series of `hf_pss.sweep.probes.PROBED`, or ``loss``."""
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
    return RatioDetector(
        Quantity.GRAD_NORM,
        limit,
        alpha=_ALPHA,
        calibration_steps=_CALIBRATION_READINGS,
        patience_steps=_PATIENCE_READINGS,
    )


def _drop(drop: float) -> Detector:
    return DropDetector(
        drop,
        alpha=_ALPHA,
        calibration_steps=_CALIBRATION_READINGS,
        patience_steps=_PATIENCE_READINGS,
    )


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
