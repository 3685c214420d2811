"""Several detectors behind one door; any of them may fire."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pss.detection.detectors import Detector
from hf_pss.detection.judgement import Judgement, Quantity, Readings
from hf_pss.detection.state import JSON, check_version, read_object
from hf_pss.errors import ConfigurationError, StateError

_VERSION = 1


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

    def continue_from(self, other: AnyOf) -> None:
        """Take over what the detectors of the same names in another set have learned."""
        for name, detector in self._detectors.items():
            if name in other._detectors:
                detector.load_state_dict(other._detectors[name].state_dict())
