"""The table of detectors: a new one is one class and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hf_pss.detection.detectors import Detector, DropDetector, FloorDetector, RatioDetector
from hf_pss.detection.judgement import Quantity
from hf_pss.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """Everything that some detector may be told; each factory takes what it needs."""

    threshold_ratio: float = 2.5
    """τ of the ratio detectors (the paper's value)."""
    baseline_alpha: float = 0.1
    """Weight of the newest value in every running baseline (ours: no source states it)."""
    calibration_steps: int = 20
    """Readings that each baseline accepts before it may fire (ours)."""
    patience_steps: int = 50
    """Firings in a row, counted in readings, after which the new level is accepted (ours)."""
    stable_rank_drop: float = 0.5
    """Share of its running baseline that a stable rank must lose to fire (ours)."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Stable-rank floor of each matrix, by name (ours)."""


def _ratio(quantity: Quantity) -> Callable[[DetectorSettings], Detector]:
    def make(settings: DetectorSettings) -> Detector:
        return RatioDetector(
            quantity,
            settings.threshold_ratio,
            alpha=settings.baseline_alpha,
            calibration_steps=settings.calibration_steps,
            patience_steps=settings.patience_steps,
        )

    return make


def _drop(settings: DetectorSettings) -> Detector:
    return DropDetector(
        settings.stable_rank_drop,
        alpha=settings.baseline_alpha,
        calibration_steps=settings.calibration_steps,
        patience_steps=settings.patience_steps,
    )


def _floor(settings: DetectorSettings) -> Detector:
    return FloorDetector(settings.floors)


DETECTORS: dict[str, Callable[[DetectorSettings], Detector]] = {
    "grad_norm_ratio": _ratio(Quantity.GRAD_NORM),
    "matrix_grad_norm_ratio": _ratio(Quantity.MATRIX_GRAD_NORM),
    "update_norm_ratio": _ratio(Quantity.UPDATE_NORM),
    "stable_rank_floor": _floor,
    "stable_rank_drop": _drop,
}


def make_detector(name: str, settings: DetectorSettings) -> Detector:
    """Build the detector of that name.

    >>> make_detector("grad_norm_ratio", DetectorSettings()).quantity.value
    'grad_norm'

    Raises:
        ConfigurationError: no such detector, or settings without a meaning for it.
    """
    if name not in DETECTORS:
        raise ConfigurationError(
            f"You asked for detector {name!r}; choose one of {', '.join(sorted(DETECTORS))}."
        )
    return DETECTORS[name](settings)
