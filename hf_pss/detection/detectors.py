"""Detectors, which turn readings of one quantity into a verdict, and the table that names them.

To add a detector, write one class and add one row to `DETECTORS`.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

from hf_pss.config import PSSConfig
from hf_pss.detection.state import (
    JSON,
    check_version,
    read_integer,
    read_mapping,
    read_number,
    read_object,
)
from hf_pss.errors import ConfigurationError, StateError

_VERSION = 1

# A quotient by a denormal float64 has lost its digits, and a quotient by 0 is undefined.
_SMALLEST_LEVEL = sys.float_info.min
_LEARNED = ("level", "num_accepted", "num_refused")

# The cap that restores a floor brings a matrix only within float32's rounding of it (5e-8
# measured). Without this tolerance such a matrix would fire again at every check.
_ROUNDING = 1e-5

Readings: TypeAlias = Mapping[str, float]
"""The readings of one quantity at one step, by matrix. A global quantity has one key, `GLOBAL`."""

GLOBAL = "global"


class Quantity(StrEnum):
    """A quantity that a detector can read."""

    GRAD_NORM = "grad_norm"
    MATRIX_GRAD_NORM = "matrix_grad_norm"
    UPDATE_NORM = "update_norm"
    STABLE_RANK = "stable_rank"
    SPECTRAL_NORM = "spectral_norm"


class Verdict(StrEnum):
    """The conclusion of a detector. The least severe one comes first."""

    CALIBRATING = "calibrating"
    NORMAL = "normal"
    SPIKE = "spike"
    NON_FINITE = "non_finite"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The conclusion of one detector about one set of readings.

    `value`, `baseline` and `threshold` belong to the worst reading, which is the one
    farthest over its threshold. While all names are still calibrating, they belong to the
    first name in sorted order.
    """

    verdict: Verdict
    detector: str
    fired: tuple[str, ...] = ()
    """The names that fired, the farthest over its threshold first, or those that are not finite."""
    value: float | None = None
    baseline: float | None = None
    """b_{t-1}, before this reading was learned. None without a baseline."""
    threshold: float | None = None
    """The number at which the reading would fire. None while nothing may fire."""
    new_level: tuple[str, ...] = ()
    """The names that fired for too long. Their baselines therefore restart at this value."""


@dataclass(slots=True)
class Baseline:
    """Exponential moving average of accepted finite values >= 0, with a calibration phase.

    It is ``b_1 = g_1`` and ``b_t = (1 - alpha) b_{t-1} + alpha g_t`` over the accepted values. The
    average comes from the paper, arXiv 2602.01308. The value of alpha and the rules below are ours.
    The average starts at the first value, so it has no bias towards zero to correct. But the first
    value keeps the weight ``(1 - alpha)^(t-1)``. The calibration phase waits until this weight is
    small: it is 0.14 after 20 values at alpha = 0.1.

    Three rules prevent harm from the average:

    - A level of 0 (or denormal) has no scale. Nothing is compared with it, and the next value
      restarts the baseline instead of being averaged into it.
    - A value that fired is refused, which means that the baseline does not learn it.
    - After `patience_steps` refusals in a row the baseline restarts at the new level and calibrates
      again. Otherwise one lasting rise would fire at every later step.

    >>> baseline = Baseline(alpha=0.5, calibration_steps=2, patience_steps=10)
    >>> baseline.accept(1.0)
    >>> baseline.accept(2.0)
    >>> baseline.level, baseline.is_calibrated, baseline.ratio(6.0)
    (1.5, True, 4.0)
    """

    alpha: float
    """The weight of the newest value, in (0, 1]."""
    calibration_steps: int
    """The number of values to accept before anything may fire, >= 1."""
    patience_steps: int
    """The number of refusals in a row after which the new level is accepted, >= 1."""
    level: float = 0.0
    """b_t. It is 0 before the first value."""
    num_accepted: int = 0
    """The number of values in the average since it last started."""
    num_refused: int = 0
    """The current number of refusals in a row."""

    @property
    def is_calibrated(self) -> bool:
        """Whether a value may be judged against the level."""
        return self._has_scale and self.num_accepted >= self.calibration_steps

    def ratio(self, value: float) -> float | None:
        """Return ``value / b_{t-1}``, None if the level has no scale, or inf if it overflows."""
        return value / self.level if self._has_scale else None

    def accept(self, value: float) -> None:
        """Learn a finite value >= 0."""
        if not self._has_scale:
            self._start_at(value)
            return
        mixed = (1 - self.alpha) * self.level + self.alpha * value
        # Rounding can lift the mean above both values, which near 1.8e308 would give inf.
        self.level = min(mixed, max(self.level, value))
        self.num_accepted += 1
        self.num_refused = 0

    def refuse(self, value: float) -> bool:
        """Do not learn `value`. If patience ends, restart the baseline at it and return True."""
        self.num_refused += 1
        if self.num_refused < self.patience_steps:
            return False
        self._start_at(value)
        return True

    def state(self) -> dict[str, JSON]:
        """Return the learned numbers, as one part of a detector's versioned state."""
        return {name: getattr(self, name) for name in _LEARNED}

    def with_state(self, state: object, *, what: str) -> Baseline:
        """Return a baseline with these settings and the given state.

        Raises:
            StateError: `state` does not have the form that `state()` returns.
        """
        found = read_object(state, _LEARNED, what)
        read = {
            name: read_integer(found[name], f"{name!r} of {what}", minimum=minimum)
            for name, minimum in (("num_accepted", 1), ("num_refused", 0))
        }
        level = read_number(found["level"], f"'level' of {what}", minimum=0.0)
        return replace(self, level=level, **read)

    @property
    def _has_scale(self) -> bool:
        return self.level >= _SMALLEST_LEVEL

    def _start_at(self, value: float) -> None:
        self.level, self.num_accepted, self.num_refused = value, 1, 0


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One reading and its threshold."""

    name: str
    value: float
    baseline: float | None = None
    threshold: float | None = None
    severity: float = 0.0
    """The reading over its threshold, as a ratio. It fires above 1, and is
    0 if nothing may fire."""

    @property
    def fired(self) -> bool:
        return self.severity > 1


class Detector(ABC):
    """Judges the readings of one quantity, each by a separate threshold, and learns from them.

    Every detector must have these properties. `tests/contracts` checks them for
    each row of `DETECTORS`:

    - One non-finite reading makes the verdict NON_FINITE. The detector then learns nothing from
      that step, so the step changes no later verdict.
    - The detector does not learn a value that fired.
    - The order of the readings does not matter.
    - If a state cannot be loaded, the detector is unchanged.

    Args:
        name: The detector's key in `DETECTORS`.
        quantity: The quantity that the detector reads.
    """

    def __init__(self, name: str, quantity: Quantity) -> None:
        self.name = name
        self.quantity = quantity

    @property
    def is_on(self) -> bool:
        """Whether the detector can fire, so that its quantity must be measured."""
        return True

    @abstractmethod
    def _compare(self, name: str, value: float) -> _Comparison:
        """Compare one finite reading with its threshold."""

    def _learn(self, comparison: _Comparison) -> bool:
        """Learn from one reading. Return True if its baseline restarts at this value."""
        return False

    def judge(self, readings: Readings) -> Judgement:
        """Judge the readings of one step, of which there is at least one, then learn from them.

        Raises:
            ConfigurationError: A reading is negative.
        """
        for name, value in readings.items():
            if value < 0 and value != -math.inf:
                raise ConfigurationError(
                    f"You gave detector {self.name!r} the reading {name!r} = {value}; "
                    "norms and stable ranks are never negative."
                )
        broken = sorted(name for name, value in readings.items() if not math.isfinite(value))
        if broken:
            return Judgement(
                Verdict.NON_FINITE, self.name, tuple(broken), value=readings[broken[0]]
            )
        comparisons = [self._compare(name, value) for name, value in readings.items()]
        new_level = tuple(sorted(c.name for c in comparisons if self._learn(c)))
        comparisons.sort(key=lambda c: (-c.severity, c.name))
        worst = comparisons[0]
        if worst.fired:
            verdict = Verdict.SPIKE
        elif any(c.threshold is not None for c in comparisons):
            verdict = Verdict.NORMAL
        else:
            verdict = Verdict.CALIBRATING
        return Judgement(
            verdict,
            self.name,
            tuple(c.name for c in comparisons if c.fired),
            worst.value,
            worst.baseline,
            worst.threshold,
            new_level,
        )

    def state_dict(self) -> dict[str, JSON]:
        """Return everything that the detector has learned, as plain JSON."""
        return {"version": _VERSION, "detector": self.name}

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state, which is parsed JSON and not trusted.

        Raises:
            StateError: The state is truncated, damaged, of a different version or
                of a different detector.
        """
        self._read_state(state)

    @property
    def _what(self) -> str:
        return f"the state of detector {self.name!r}"

    def _read_state(self, state: object, *keys: str) -> dict[str, object]:
        check_version(state, _VERSION, self._what)
        fields = read_object(state, ("version", "detector", *keys), self._what)
        if fields["detector"] != self.name:
            raise StateError(
                f"You gave {self._what} a state of detector {fields['detector']!r}; "
                "load the state that this detector saved."
            )
        return fields


class RatioDetector(Detector):
    """Fires when a reading is too far from its running baseline: ``g_t / b_{t-1}`` passes τ.

    A τ above 1 fires above it. Section "Detection" of PSS (arXiv 2602.01308) defines this for the
    global gradient norm with τ = 2.5. The use of other quantities, and of one baseline for each
    matrix, is ours. A τ below 1 fires below it, which is ours as well. Weight decay alone lowers
    stable ranks slowly. So each matrix is compared with its recent past, and never with an absolute
    level.

    >>> baseline = Baseline(alpha=0.1, calibration_steps=2, patience_steps=50)
    >>> detector = RatioDetector("grad_norm_ratio", Quantity.GRAD_NORM, 2.5, baseline)
    >>> [detector.judge({"global": g}).verdict.value for g in (1.0, 1.0, 2.4, 9.0, float("nan"))]
    ['calibrating', 'calibrating', 'normal', 'spike', 'non_finite']

    Args:
        name: The detector's key in `DETECTORS`.
        quantity: The quantity that the detector reads.
        limit_ratio: τ.
        new_baseline: The baseline that each name starts with.
    """

    def __init__(
        self, name: str, quantity: Quantity, limit_ratio: float, new_baseline: Baseline
    ) -> None:
        super().__init__(name, quantity)
        self._limit_ratio = limit_ratio
        self._new_baseline = new_baseline
        self._baselines: dict[str, Baseline] = {}

    def _compare(self, name: str, value: float) -> _Comparison:
        baseline = self._baselines.setdefault(name, replace(self._new_baseline))
        ratio, limit = baseline.ratio(value), self._limit_ratio
        if ratio is None:
            return _Comparison(name, value)
        if not baseline.is_calibrated:
            return _Comparison(name, value, baseline.level)
        if limit > 1:
            severity = ratio / limit
        else:
            severity = limit / ratio if ratio else math.inf
        return _Comparison(name, value, baseline.level, limit * baseline.level, severity)

    def _learn(self, comparison: _Comparison) -> bool:
        baseline = self._baselines[comparison.name]
        if comparison.fired:
            return baseline.refuse(comparison.value)
        baseline.accept(comparison.value)
        return False

    def state_dict(self) -> dict[str, JSON]:
        """Return the baselines as plain JSON."""
        baselines: dict[str, JSON] = {n: each.state() for n, each in self._baselines.items()}
        return {**super().state_dict(), "baselines": baselines}

    def load_state_dict(self, state: object) -> None:
        """See `Detector.load_state_dict`."""
        fields = self._read_state(state, "baselines")
        saved = read_mapping(fields["baselines"], what=f"'baselines' of {self._what}")
        self._baselines = {
            name: self._new_baseline.with_state(one, what=f"baseline {name!r} of {self._what}")
            for name, one in saved.items()
        }


class FloorDetector(Detector):
    """Fires when a stable rank is below the floor of its matrix. It learns nothing.

    This detector is ours. A floor is absolute on purpose, and no patience raises it, because a
    matrix that stays below its floor stays too singular. The caller chooses the floors.

    >>> FloorDetector({"w": 16.0}).judge({"w": 4.0}).fired
    ('w',)
    """

    def __init__(self, floors: Mapping[str, float]) -> None:
        for name, floor in floors.items():
            if not 0 <= floor < math.inf:
                raise ConfigurationError(
                    f"You gave {floor} as stable-rank floor of {name!r}; choose a finite "
                    "number >= 0 (0 never fires)."
                )
        super().__init__("stable_rank_floor", Quantity.STABLE_RANK)
        self._floors = dict(floors)

    @property
    def is_on(self) -> bool:
        """Whether at least one floor is above 0."""
        return any(self._floors.values())

    def _compare(self, name: str, value: float) -> _Comparison:
        floor = self._floors[name]
        severity = (1 - _ROUNDING) * floor / value if value else (math.inf if floor else 0.0)
        return _Comparison(name, value, None, floor, severity)


class AnyOf:
    """Passes the readings of a quantity to every detector that reads it.

    Quantities become available at different times: gradient norms before each update, and
    stable ranks after every tenth update. So readings are judged one quantity at a time, and no
    detector waits for a different one. Each detector returns a separate judgement. In a run
    with too high a learning rate the floor may fire at every check, and it must not hide a drop
    in a different matrix.

    >>> detectors = AnyOf([FloorDetector({"w": 16.0})])
    >>> [judgement.fired for judgement in detectors.judge(Quantity.STABLE_RANK, {"w": 4.0})]
    [('w',)]
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"You gave the detectors {names}; give each only once.")
        self._detectors = {detector.name: detector for detector in detectors}

    @property
    def quantities(self) -> frozenset[Quantity]:
        """The quantities to measure."""
        return frozenset(d.quantity for d in self._detectors.values() if d.is_on)

    def judge(self, quantity: Quantity, readings: Readings) -> list[Judgement]:
        """Return one judgement for each detector that reads the quantity, in their order."""
        readers = (d for d in self._detectors.values() if d.quantity == quantity)
        return [detector.judge(readings) for detector in readers]

    def state_dict(self) -> dict[str, JSON]:
        """Return the states of all detectors, as plain JSON."""
        states: dict[str, JSON] = {n: d.state_dict() for n, d in self._detectors.items()}
        return {"version": _VERSION, "detectors": states}

    def load_state_dict(self, state: object) -> None:
        """Continue all detectors from a saved state, which is parsed JSON and not trusted.

        Raises:
            StateError: The state is damaged, of a different version, or of different detectors.
        """
        what = "the state of the detectors"
        check_version(state, _VERSION, what)
        fields = read_object(state, ("version", "detectors"), what)
        saved = read_object(fields["detectors"], tuple(self._detectors), what)
        for name, detector in self._detectors.items():
            detector.load_state_dict(saved[name])

    def continue_from(self, other: AnyOf) -> None:
        """Copy the learned state of every detector that is also in the other set."""
        for name, detector in self._detectors.items():
            if name in other._detectors:
                detector.load_state_dict(other._detectors[name].state_dict())


Floors: TypeAlias = Mapping[str, float]
"""The stable-rank floor of each matrix by name. No option holds this setting."""

_Factory: TypeAlias = Callable[[PSSConfig, Floors], Detector]


def _ratio(name: str, quantity: Quantity, limit: Callable[[PSSConfig], float]) -> _Factory:
    def make(config: PSSConfig, floors: Floors) -> Detector:
        baseline = Baseline(config.baseline_alpha, config.calibration_steps, config.patience_steps)
        return RatioDetector(name, quantity, limit(config), baseline)

    return make


def _threshold(config: PSSConfig) -> float:
    return config.threshold_ratio


DETECTORS: dict[str, _Factory] = {
    "grad_norm_ratio": _ratio("grad_norm_ratio", Quantity.GRAD_NORM, _threshold),
    "matrix_grad_norm_ratio": _ratio(
        "matrix_grad_norm_ratio", Quantity.MATRIX_GRAD_NORM, _threshold
    ),
    "update_norm_ratio": _ratio("update_norm_ratio", Quantity.UPDATE_NORM, _threshold),
    "stable_rank_floor": lambda _, floors: FloorDetector(floors),
    "stable_rank_drop": _ratio(
        "stable_rank_drop", Quantity.STABLE_RANK, lambda config: 1 - config.stable_rank_drop
    ),
    "spectral_norm_ratio": _ratio(
        "spectral_norm_ratio", Quantity.SPECTRAL_NORM, lambda config: config.spectral_norm_ratio
    ),
}
"""The factory of each detector by name. It needs the options and the floors of the matrices."""
