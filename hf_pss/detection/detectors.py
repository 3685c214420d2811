"""Detectors: readings of one quantity in, a verdict out.

Several detectors behind one door; any of them may fire.

The table of detectors: a new one is one class and one row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from hf_pss.config import PSSConfig
from hf_pss.detection.baseline import Baseline
from hf_pss.detection.judgement import Judgement, Quantity, Readings, Verdict
from hf_pss.detection.state import JSON, check_version, read_mapping, read_object
from hf_pss.errors import ConfigurationError, StateError

_VERSION = 1

# A capped matrix is at its floor to float32's rounding (5e-8 measured), and is not to be capped
# again for that.
_ROUNDING = 1e-5


class Detector(Protocol):
    """Judges the readings of one quantity, and learns from them.

    Every detector keeps these promises; `tests/contracts` holds each row of the registry to them:

    - one non-finite reading makes the verdict NON_FINITE and nothing of that step is learned, so
      the step changes no later verdict;
    - a value that fired is not learned;
    - the order of the readings does not matter;
    - a state that cannot be loaded leaves the detector as it was.
    """

    @property
    def name(self) -> str:
        """Its key in the registry."""

    @property
    def quantity(self) -> Quantity:
        """What it reads."""

    def judge(self, readings: Readings) -> Judgement:
        """Judge the readings of one step, then learn from them.

        Raises:
            ConfigurationError: no reading, a negative one, or one the detector cannot judge.
        """

    def state_dict(self) -> dict[str, JSON]:
        """Return all that was learned, as plain JSON."""

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state: parsed JSON, not trusted.

        Raises:
            StateError: truncated, damaged, of another version, or of another detector.
        """


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One reading beside its threshold."""

    name: str
    value: float
    baseline: float | None
    threshold: float | None
    severity: float
    """How far over the threshold, as a ratio; fires above 1, is 0 where nothing may fire."""

    @property
    def fired(self) -> bool:
        return self.severity > 1


class _BaselineDetector(ABC):
    """Compares each reading with its own running baseline."""

    def __init__(
        self,
        name: str,
        quantity: Quantity,
        limit_ratio: float,
        *,
        alpha: float,
        calibration_steps: int,
        patience_steps: int,
    ) -> None:
        self.name = name
        self.quantity = quantity
        self._limit_ratio = limit_ratio
        self._settings = (alpha, calibration_steps, patience_steps)
        self._new_baseline()  # refuses an alpha without a meaning now, not at the first reading
        self._baselines: dict[str, Baseline] = {}

    @abstractmethod
    def _severity(self, ratio: float) -> float:
        """Map value / baseline to how far over the limit it is; above 1 fires."""

    def judge(self, readings: Readings) -> Judgement:
        """See `Detector.judge`."""
        _check_readings(self.name, readings)
        if non_finite := _judge_non_finite(self.name, readings):
            return non_finite
        comparisons = [self._compare(name, value) for name, value in readings.items()]
        new_level = sorted(c.name for c in comparisons if self._learn(c))
        return _summarise(self.name, comparisons, tuple(new_level))

    def state_dict(self) -> dict[str, JSON]:
        """See `Detector.state_dict`."""
        return {
            "version": _VERSION,
            "detector": self.name,
            "baselines": {name: baseline.state() for name, baseline in self._baselines.items()},
        }

    def load_state_dict(self, state: object) -> None:
        """See `Detector.load_state_dict`."""
        fields = _read_state(self.name, state, "baselines")
        baselines = read_mapping(fields["baselines"], what=f"'baselines' of {_named(self.name)}")
        self._baselines = {
            name: self._new_baseline().with_state(
                saved, what=f"baseline {name!r} of {_named(self.name)}"
            )
            for name, saved in baselines.items()
        }

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
        """Learn or refuse one reading; return True if its baseline starts anew at it."""
        baseline = self._baselines.setdefault(comparison.name, self._new_baseline())
        if comparison.fired:
            return baseline.refuse(comparison.value)
        baseline.accept(comparison.value)
        return False

    def _new_baseline(self) -> Baseline:
        return Baseline(*self._settings)


class RatioDetector(_BaselineDetector):
    """Fires when a reading is more than τ times its baseline: ``g_t / b_{t-1} > τ``.

    Section "Detection" of PSS (arXiv 2602.01308) has it for the global gradient norm, with
    τ = 2.5; one baseline a matrix, and the update norm, are ours: the same class reads whatever
    quantity it is given, and keeps one baseline for each name.

    >>> detector = RatioDetector(
    ...     Quantity.GRAD_NORM, 2.5, alpha=0.1, calibration_steps=2, patience_steps=50
    ... )
    >>> [detector.judge({"global": g}).verdict.value for g in (1.0, 1.0, 2.4, 9.0, float("nan"))]
    ['calibrating', 'calibrating', 'normal', 'spike', 'non_finite']
    """

    def __init__(
        self,
        quantity: Quantity,
        threshold_ratio: float,
        *,
        alpha: float,
        calibration_steps: int,
        patience_steps: int,
    ) -> None:
        super().__init__(
            f"{quantity}_ratio",
            quantity,
            threshold_ratio,
            alpha=alpha,
            calibration_steps=calibration_steps,
            patience_steps=patience_steps,
        )

    def _severity(self, ratio: float) -> float:
        return ratio / self._limit_ratio


class DropDetector(_BaselineDetector):
    """Fires when a reading falls below a share of its baseline: ``s_t < (1 - drop) b_{t-1}``.

    Ours: weight decay alone lowers stable ranks slowly, so each matrix is compared with its own
    recent past and never with an absolute level.

    >>> detector = DropDetector(0.5, alpha=0.1, calibration_steps=1, patience_steps=50)
    >>> [detector.judge({"w": s}).verdict.value for s in (10.0, 9.0, 3.0)]
    ['calibrating', 'normal', 'spike']
    """

    def __init__(
        self, drop: float, *, alpha: float, calibration_steps: int, patience_steps: int
    ) -> None:
        super().__init__(
            "stable_rank_drop",
            Quantity.STABLE_RANK,
            1 - drop,
            alpha=alpha,
            calibration_steps=calibration_steps,
            patience_steps=patience_steps,
        )

    def _severity(self, ratio: float) -> float:
        return self._limit_ratio / ratio if ratio else math.inf


class FloorDetector:
    """Fires when a stable rank is below the floor of its matrix; learns nothing.

    Ours. A floor is absolute on purpose and no patience raises it: what fires for ever here stays
    too singular for ever. How floors are chosen is the caller's matter.

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
        self.name = "stable_rank_floor"
        self.quantity = Quantity.STABLE_RANK
        self._floors = dict(floors)

    def judge(self, readings: Readings) -> Judgement:
        """See `Detector.judge`."""
        _check_readings(self.name, readings)
        if unknown := sorted(set(readings) - set(self._floors)):
            raise ConfigurationError(
                f"You gave {len(unknown)} stable ranks without a floor, such as {unknown[0]!r}; "
                "give one floor for every matrix that is read (0 never fires)."
            )
        if non_finite := _judge_non_finite(self.name, readings):
            return non_finite
        return _summarise(self.name, [self._compare(*reading) for reading in readings.items()])

    def state_dict(self) -> dict[str, JSON]:
        """See `Detector.state_dict`."""
        return {"version": _VERSION, "detector": self.name}

    def load_state_dict(self, state: object) -> None:
        """See `Detector.load_state_dict`."""
        _read_state(self.name, state)

    def _compare(self, name: str, value: float) -> _Comparison:
        floor = self._floors[name]
        severity = (1 - _ROUNDING) * floor / value if value else (math.inf if floor else 0.0)
        return _Comparison(name, value, None, floor, severity)


def _check_readings(detector: str, readings: Readings) -> None:
    if not readings:
        raise ConfigurationError(
            f"You gave detector {detector!r} no reading: it would never fire. "
            "Call judge only at steps where its quantity was measured."
        )
    for name, value in readings.items():
        if value < 0 and value != -math.inf:
            raise ConfigurationError(
                f"You gave detector {detector!r} the reading {name!r} = {value}; "
                "norms and stable ranks are never negative."
            )


def _judge_non_finite(detector: str, readings: Readings) -> Judgement | None:
    names = sorted(name for name, value in readings.items() if not math.isfinite(value))
    if not names:
        return None
    return Judgement(Verdict.NON_FINITE, detector, tuple(names), value=readings[names[0]])


def _summarise(
    detector: str, comparisons: Sequence[_Comparison], new_level: tuple[str, ...] = ()
) -> Judgement:
    ranked = sorted(comparisons, key=lambda c: (-c.severity, c.name))
    fired = tuple(c.name for c in ranked if c.fired)
    if fired:
        verdict = Verdict.SPIKE
    elif any(c.threshold is not None for c in ranked):
        verdict = Verdict.NORMAL
    else:
        verdict = Verdict.CALIBRATING
    worst = ranked[0]
    return Judgement(
        verdict, detector, fired, worst.value, worst.baseline, worst.threshold, new_level
    )


def _read_state(detector: str, state: object, *keys: str) -> dict[str, object]:
    what = _named(detector)
    check_version(state, _VERSION, what)
    fields = read_object(state, ("version", "detector", *keys), what)
    if fields["detector"] != detector:
        raise StateError(
            f"You gave {what} a state of detector {fields['detector']!r}; "
            "load the state that this detector saved."
        )
    return fields


def _named(detector: str) -> str:
    return f"the state of detector {detector!r}"


_ANY_OF_VERSION = 1


class AnyOf:
    """Hands the readings of a quantity to every detector that reads it.

    Quantities come at different moments and rhythms (gradient norms before each update, stable
    ranks after every tenth), so readings are judged one quantity at a time and no detector waits
    for another. Each answers for itself: the floor fires at every check of a run that is too hot,
    and a drop in another matrix must be heard all the same.

    >>> from hf_pss.detection.detectors import FloorDetector
    >>> guard = AnyOf([FloorDetector({"w": 16.0})])
    >>> [judgement.fired for judgement in guard.judge(Quantity.STABLE_RANK, {"w": 4.0})]
    [('w',)]
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"You gave the detectors {names}; give each only once.")
        self._detectors = {detector.name: detector for detector in detectors}

    @property
    def quantities(self) -> frozenset[Quantity]:
        """What has to be measured."""
        return frozenset(detector.quantity for detector in self._detectors.values())

    def judge(self, quantity: Quantity, readings: Readings) -> list[Judgement]:
        """Judge one quantity: one judgement for each detector that reads it, in their order.

        Raises:
            ConfigurationError: no detector reads `quantity`, or one cannot judge the readings.
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
        return {"version": _ANY_OF_VERSION, "detectors": states}

    def load_state_dict(self, state: object) -> None:
        """Continue all detectors from a saved state (parsed JSON, not trusted), or none of them.

        Raises:
            StateError: damaged, of another version, or of another set of detectors.
        """
        what = "the state of the detectors"
        check_version(state, _ANY_OF_VERSION, what)
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
        """Take over what the detectors of the same names in another set have learned."""
        for name, detector in self._detectors.items():
            if name in other._detectors:
                detector.load_state_dict(other._detectors[name].state_dict())


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
