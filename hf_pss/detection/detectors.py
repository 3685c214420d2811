"""Detectors, which turn readings of one quantity into a verdict, and the table that names them.

To add a detector, write one class and add one row to `DETECTORS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from hf_pss.config import PSSConfig
from hf_pss.detection.baseline import Baseline
from hf_pss.detection.judgement import Judgement, Quantity, Readings, Verdict
from hf_pss.detection.state import JSON, check_version, read_mapping, read_object
from hf_pss.errors import ConfigurationError, StateError

_VERSION = 1

# The cap that restores a floor brings a matrix only within float32's rounding of it (5e-8
# measured). Without this tolerance such a matrix would fire again at every check.
_ROUNDING = 1e-5


class Detector(Protocol):
    """Judges the readings of one quantity, and learns from them.

    Every detector must have these properties. `tests/contracts` checks them for
    each row of `DETECTORS`:

    - One non-finite reading makes the verdict NON_FINITE. The detector then learns nothing from
      that step, so the step changes no later verdict.
    - The detector does not learn a value that fired.
    - The order of the readings does not matter.
    - If a state cannot be loaded, the detector is unchanged.
    """

    @property
    def name(self) -> str:
        """The detector's key in `DETECTORS`."""

    @property
    def quantity(self) -> Quantity:
        """The quantity that the detector reads."""

    def judge(self, readings: Readings) -> Judgement:
        """Judge the readings of one step, then learn from them.

        Raises:
            ConfigurationError: Readings are missing or negative, or the detector
                cannot judge one of them.
        """

    def state_dict(self) -> dict[str, JSON]:
        """Return everything that the detector has learned, as plain JSON."""

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state, which is parsed JSON and not trusted.

        Raises:
            StateError: The state is truncated, damaged, of a different version or
                of a different detector.
        """


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One reading and its threshold."""

    name: str
    value: float
    baseline: float | None
    threshold: float | None
    severity: float
    """The reading over its threshold, as a ratio. It fires above 1, and is
    0 if nothing may fire."""

    @property
    def fired(self) -> bool:
        return self.severity > 1


class _ComparingDetector(ABC):
    """Compares each reading with a separate threshold."""

    def __init__(self, name: str, quantity: Quantity) -> None:
        self.name = name
        self.quantity = quantity

    @abstractmethod
    def _compare(self, name: str, value: float) -> _Comparison:
        """Compare one finite reading with its threshold."""

    def _learn(self, comparison: _Comparison) -> bool:
        """Learn from one reading. Return True if its baseline restarts at this value."""
        return False

    def _check(self, readings: Readings) -> None:
        if not readings:
            raise ConfigurationError(
                f"You gave detector {self.name!r} no reading: it would never fire. "
                "Call judge only at steps where its quantity was measured."
            )
        for name, value in readings.items():
            if value < 0 and value != -math.inf:
                raise ConfigurationError(
                    f"You gave detector {self.name!r} the reading {name!r} = {value}; "
                    "norms and stable ranks are never negative."
                )

    def judge(self, readings: Readings) -> Judgement:
        """See `Detector.judge`."""
        self._check(readings)
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
        """See `Detector.state_dict`."""
        return {"version": _VERSION, "detector": self.name}

    def load_state_dict(self, state: object) -> None:
        """See `Detector.load_state_dict`."""
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


class _BaselineDetector(_ComparingDetector):
    """Compares each reading with a separate running baseline."""

    def __init__(
        self, name: str, quantity: Quantity, limit_ratio: float, new_baseline: Baseline
    ) -> None:
        super().__init__(name, quantity)
        self._limit_ratio = limit_ratio
        self._new_baseline = new_baseline
        self._baselines: dict[str, Baseline] = {}

    @abstractmethod
    def _severity(self, ratio: float) -> float:
        """Map value / baseline to the severity. A severity above 1 fires."""

    def _compare(self, name: str, value: float) -> _Comparison:
        baseline = self._baselines.get(name)
        ratio = baseline.ratio(value) if baseline else None
        if baseline is None or ratio is None:
            return _Comparison(name, value, None, None, 0.0)
        if not baseline.is_calibrated:
            return _Comparison(name, value, baseline.level, None, 0.0)
        threshold = self._limit_ratio * baseline.level
        return _Comparison(name, value, baseline.level, threshold, self._severity(ratio))

    def _learn(self, comparison: _Comparison) -> bool:
        baseline = self._baselines.setdefault(comparison.name, replace(self._new_baseline))
        if comparison.fired:
            return baseline.refuse(comparison.value)
        baseline.accept(comparison.value)
        return False

    def state_dict(self) -> dict[str, JSON]:
        """See `Detector.state_dict`."""
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


class RatioDetector(_BaselineDetector):
    """Fires when a reading is more than τ times its baseline: ``g_t / b_{t-1} > τ``.

    Section "Detection" of PSS (arXiv 2602.01308) defines this for the global gradient norm with τ =
    2.5. The use of other quantities, and of one baseline for each matrix, is ours.

    >>> baseline = Baseline(alpha=0.1, calibration_steps=2, patience_steps=50)
    >>> detector = RatioDetector(Quantity.GRAD_NORM, 2.5, baseline)
    >>> [detector.judge({"global": g}).verdict.value for g in (1.0, 1.0, 2.4, 9.0, float("nan"))]
    ['calibrating', 'calibrating', 'normal', 'spike', 'non_finite']

    Args:
        quantity: The quantity that the detector reads.
        threshold_ratio: τ.
        new_baseline: The baseline that each name starts with.
    """

    def __init__(self, quantity: Quantity, threshold_ratio: float, new_baseline: Baseline) -> None:
        super().__init__(f"{quantity}_ratio", quantity, threshold_ratio, new_baseline)

    def _severity(self, ratio: float) -> float:
        return ratio / self._limit_ratio


class DropDetector(_BaselineDetector):
    """Fires when a reading falls below a share of its baseline: ``s_t < (1 - drop) b_{t-1}``.

    This detector is ours. Weight decay alone lowers stable ranks slowly. So each matrix is compared
    with its recent past, and never with an absolute level.

    >>> baseline = Baseline(alpha=0.1, calibration_steps=1, patience_steps=50)
    >>> detector = DropDetector(0.5, baseline)
    >>> [detector.judge({"w": s}).verdict.value for s in (10.0, 9.0, 3.0)]
    ['calibrating', 'normal', 'spike']
    """

    def __init__(self, drop: float, new_baseline: Baseline) -> None:
        super().__init__("stable_rank_drop", Quantity.STABLE_RANK, 1 - drop, new_baseline)

    def _severity(self, ratio: float) -> float:
        return self._limit_ratio / ratio if ratio else math.inf


class FloorDetector(_ComparingDetector):
    """Fires when a stable rank is below the floor of its matrix. It learns nothing.

    This detector is ours. A floor is absolute on purpose, and no patience raises it, because a
    matrix that stays below its floor stays too singular. The caller chooses the floors.

    >>> FloorDetector({"w": 16.0}).judge({"w": 4.0}).fired
    ('w',)
    """

    def __init__(self, floors: Mapping[str, float]) -> None:
        if not floors:
            raise ConfigurationError(
                "You gave no stable-rank floor; give one for every matrix that is read."
            )
        for name, floor in floors.items():
            if not 0 <= floor < math.inf:
                raise ConfigurationError(
                    f"You gave {floor} as stable-rank floor of {name!r}; choose a finite "
                    "number >= 0 (0 never fires)."
                )
        super().__init__("stable_rank_floor", Quantity.STABLE_RANK)
        self._floors = dict(floors)

    def _check(self, readings: Readings) -> None:
        super()._check(readings)
        if unknown := sorted(set(readings) - set(self._floors)):
            raise ConfigurationError(
                f"You gave {len(unknown)} stable ranks without a floor, such as {unknown[0]!r}; "
                "give one floor for every matrix that is read (0 never fires)."
            )

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
        return frozenset(detector.quantity for detector in self._detectors.values())

    def judge(self, quantity: Quantity, readings: Readings) -> list[Judgement]:
        """Return one judgement for each detector that reads the quantity, in their order.

        Raises:
            ConfigurationError: No detector reads `quantity`, or one cannot judge the readings.
        """
        readers = [d for d in self._detectors.values() if d.quantity == quantity]
        if not readers:
            raise ConfigurationError(
                f"You gave readings of {quantity.value!r}, which no detector here reads; "
                f"give one of {', '.join(sorted(self.quantities))}."
            )
        return [detector.judge(readings) for detector in readers]

    def state_dict(self) -> dict[str, JSON]:
        """Return the states of all detectors, as plain JSON."""
        states: dict[str, JSON] = {n: d.state_dict() for n, d in self._detectors.items()}
        return {"version": _VERSION, "detectors": states}

    def load_state_dict(self, state: object) -> None:
        """Continue all detectors from a saved state (parsed JSON, not trusted), or none of them.

        Raises:
            StateError: The state is damaged, of a different version, or of different detectors.
        """
        what = "the state of the detectors"
        check_version(state, _VERSION, what)
        fields = read_object(state, ("version", "detectors"), what)
        saved = read_object(fields["detectors"], tuple(self._detectors), what)
        before = {name: detector.state_dict() for name, detector in self._detectors.items()}
        try:
            for name, detector in self._detectors.items():
                detector.load_state_dict(saved[name])
        except StateError:
            for name, detector in self._detectors.items():
                detector.load_state_dict(before[name])
            raise

    def continue_from(self, other: AnyOf) -> None:
        """Copy the learned state of every detector that is also in the other set."""
        for name, detector in self._detectors.items():
            if name in other._detectors:
                detector.load_state_dict(other._detectors[name].state_dict())


Floors: TypeAlias = Mapping[str, float]
"""The stable-rank floor of each matrix by name. No option holds this setting."""

_Factory: TypeAlias = Callable[[PSSConfig, Floors], Detector]


def _new_baseline(config: PSSConfig) -> Baseline:
    return Baseline(config.baseline_alpha, config.calibration_steps, config.patience_steps)


def _gradient_ratio(quantity: Quantity) -> _Factory:
    return lambda config, _: RatioDetector(quantity, config.threshold_ratio, _new_baseline(config))


DETECTORS: dict[str, _Factory] = {
    "grad_norm_ratio": _gradient_ratio(Quantity.GRAD_NORM),
    "matrix_grad_norm_ratio": _gradient_ratio(Quantity.MATRIX_GRAD_NORM),
    "update_norm_ratio": _gradient_ratio(Quantity.UPDATE_NORM),
    "stable_rank_floor": lambda _, floors: FloorDetector(floors),
    "stable_rank_drop": lambda config, _: DropDetector(
        config.stable_rank_drop, _new_baseline(config)
    ),
    "spectral_norm_ratio": lambda config, _: RatioDetector(
        Quantity.SPECTRAL_NORM, config.spectral_norm_ratio, _new_baseline(config)
    ),
}


def make_detector(name: str, config: PSSConfig, floors: Floors) -> Detector:
    """Build the detector with this name from the options and floors that it needs.

    >>> make_detector("grad_norm_ratio", PSSConfig(), {}).quantity.value
    'grad_norm'

    Raises:
        ConfigurationError: The name is unknown, or the detector cannot use these floors.
    """
    if name not in DETECTORS:
        raise ConfigurationError(
            f"You asked for detector {name!r}; choose one of {', '.join(sorted(DETECTORS))}."
        )
    return DETECTORS[name](config, floors)
