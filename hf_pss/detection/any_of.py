"""Several detectors behind one door; any of them may fire."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pss.detection.detectors import Detector
from hf_pss.detection.judgement import Judgement, Quantity, Readings, worst
from hf_pss.detection.state import JSON, check_version, read_object
from hf_pss.errors import ConfigurationError, StateError

_VERSION = 1


class AnyOf:
    """Hands the readings of a quantity to every detector that reads it.

    Quantities come at different moments and rhythms (gradient norms before each update, stable
    ranks after every tenth), so readings are judged one quantity at a time and no detector waits
    for another. The answer is the gravest judgement; among equals, the detector named first.

    >>> from hf_pss.detection.detectors import FloorDetector
    >>> guard = AnyOf([FloorDetector({"w": 16.0})])
    >>> guard.judge(Quantity.STABLE_RANK, {"w": 4.0}).detector
    'stable_rank_floor'
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names) or not names:
            raise ConfigurationError(
                f"You gave the detectors {names}; give at least one, and each only once."
            )
        self._detectors = {detector.name: detector for detector in detectors}

    @property
    def quantities(self) -> frozenset[Quantity]:
        """What has to be measured."""
        return frozenset(detector.quantity for detector in self._detectors.values())

    def judge(self, quantity: Quantity, readings: Readings) -> Judgement:
        """Judge one quantity by all its detectors and return the gravest judgement.

        Raises:
            ConfigurationError: no detector reads `quantity`, or one cannot judge the readings.
        """
        readers = [d for d in self._detectors.values() if d.quantity == quantity]
        if not readers:
            raise ConfigurationError(
                f"You gave readings of {quantity.value!r}, which no detector here reads; "
                f"give one of {', '.join(sorted(self.quantities))}."
            )
        return worst([detector.judge(readings) for detector in readers])

    def state_dict(self) -> dict[str, JSON]:
        """Return the states of all detectors, as plain JSON."""
        states: dict[str, JSON] = {n: d.state_dict() for n, d in self._detectors.items()}
        return {"version": _VERSION, "detectors": states}

    def load_state_dict(self, state: object) -> None:
        """Continue all detectors from a saved state (parsed JSON, not trusted), or none of them.

        Raises:
            StateError: damaged, of another version, or of another set of detectors.
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
