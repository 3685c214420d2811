"""The table of detectors: a new one is one class and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import Detector, DropDetector, FloorDetector, RatioDetector
from hf_pss.detection.judgement import Quantity
from hf_pss.errors import ConfigurationError

Floors: TypeAlias = Mapping[str, float]
"""Stable-rank floor of each matrix, by name: the one setting that no option holds."""

_Factory: TypeAlias = Callable[[PSSConfig, Floors], Detector]


def _ratio(quantity: Quantity) -> _Factory:
    def make(config: PSSConfig, floors: Floors) -> Detector:
        return RatioDetector(
            quantity,
            config.threshold_ratio,
            alpha=config.baseline_alpha,
            calibration_steps=config.calibration_steps,
            patience_steps=config.patience_steps,
        )

    return make


def _growth(config: PSSConfig, floors: Floors) -> Detector:
    return RatioDetector(
        Quantity.SPECTRAL_NORM,
        config.spectral_norm_ratio,
        alpha=config.baseline_alpha,
        calibration_steps=config.calibration_steps,
        patience_steps=config.patience_steps,
    )


def _drop(config: PSSConfig, floors: Floors) -> Detector:
    return DropDetector(
        config.stable_rank_drop,
        alpha=config.baseline_alpha,
        calibration_steps=config.calibration_steps,
        patience_steps=config.patience_steps,
    )


def _floor(config: PSSConfig, floors: Floors) -> Detector:
    return FloorDetector(floors)


DETECTORS: dict[str, _Factory] = {
    "grad_norm_ratio": _ratio(Quantity.GRAD_NORM),
    "matrix_grad_norm_ratio": _ratio(Quantity.MATRIX_GRAD_NORM),
    "update_norm_ratio": _ratio(Quantity.UPDATE_NORM),
    "stable_rank_floor": _floor,
    "stable_rank_drop": _drop,
    "spectral_norm_ratio": _growth,
}


def make_detector(name: str, config: PSSConfig, floors: Floors) -> Detector:
    """Build the detector of that name; it takes what it needs of the options and floors.

    >>> make_detector("grad_norm_ratio", PSSConfig(), {}).quantity.value
    'grad_norm'

    Raises:
        ConfigurationError: no such detector, or floors without a meaning for it.
    """
    if name not in DETECTORS:
        raise ConfigurationError(
            f"You asked for detector {name!r}; choose one of {', '.join(sorted(DETECTORS))}."
        )
    return DETECTORS[name](config, floors)
