"""Detectors: readings of one quantity in, a verdict out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
