"""What every detector promises, for each row of the registry; a new row is covered untouched."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pss import PSSConfig
from hf_pss.detection.detectors import DETECTORS, Detector, Judgement, Quantity, Verdict
from hf_pss.errors import ConfigurationError, StateError

NAMES = ("a", "b", "c")
CALM = 1.0
# One way or the other, tenfold must be noticed.
ALARMS = (10.0, 0.1)
CONFIG = PSSConfig.preset("paper", calibration_steps=3, patience_steps=4)
FLOORS = dict.fromkeys(NAMES, 0.5)

every_detector = pytest.mark.parametrize("name", sorted(DETECTORS))
non_finite = st.sampled_from([math.nan, math.inf, -math.inf])
readings = st.fixed_dictionaries(
    dict.fromkeys(NAMES, st.sampled_from([0.0, 1e-300, 0.1, 0.4, 1.0, 1.5, 2.6, 30.0, 1e308]))
)


def calibrated(name: str) -> Detector:
    detector = DETECTORS[name](CONFIG, FLOORS)
    for _ in range(10):
        detector.judge(dict.fromkeys(NAMES, CALM))
    return detector


def alarm_of(name: str) -> float:
    fires = [
        value
        for value in ALARMS
        if calibrated(name).judge(dict.fromkeys(NAMES, value)).verdict is Verdict.SPIKE
    ]
    assert len(fires) == 1, "a detector must notice a tenfold change in one direction"
    return fires[0]


def replay(detector: Detector, steps: list[dict[str, float]]) -> list[str]:
    return [repr(detector.judge(step)) for step in steps]  # repr: bit for bit, and NaN is NaN


@every_detector
def test_is_called_as_its_row(name: str) -> None:
    detector = DETECTORS[name](CONFIG, FLOORS)
    assert detector.name == name
    assert isinstance(detector.quantity, Quantity)


@every_detector
def test_calm_never_fires(name: str) -> None:
    detector = DETECTORS[name](CONFIG, FLOORS)
    for _ in range(50):
        judgement = detector.judge(dict.fromkeys(NAMES, CALM))
        assert judgement.verdict in (Verdict.CALIBRATING, Verdict.NORMAL)
        assert judgement.fired == ()
        assert (judgement.threshold is None) == (judgement.verdict is Verdict.CALIBRATING)


@every_detector
def test_alarm_fires_and_names_what_fired(name: str) -> None:
    alarm = alarm_of(name)
    judgement = calibrated(name).judge({"a": CALM, "b": alarm, "c": CALM})
    assert (judgement.verdict, judgement.fired, judgement.value) == (Verdict.SPIKE, ("b",), alarm)
    assert judgement.threshold is not None


@every_detector
def test_value_that_fired_is_not_learned(name: str) -> None:
    alarm = alarm_of(name)
    spiked, calm = calibrated(name), calibrated(name)
    spiked.judge(dict.fromkeys(NAMES, alarm))
    assert spiked.judge(dict.fromkeys(NAMES, CALM)) == calm.judge(dict.fromkeys(NAMES, CALM))


@every_detector
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_a_verdict_of_its_own_and_leaves_no_trace(name: str, bad: float) -> None:
    detector = calibrated(name)
    before = copy.deepcopy(detector.state_dict())
    judgement = detector.judge({"a": CALM, "b": bad, "c": 1e3})
    assert (judgement.verdict, judgement.fired) == (Verdict.NON_FINITE, ("b",))
    assert detector.state_dict() == before


@every_detector
@settings(max_examples=150, deadline=None)
@given(data=st.data(), steps=st.lists(readings, max_size=25))
def test_one_non_finite_step_anywhere_changes_no_other_verdict(
    name: str, data: st.DataObject, steps: list[dict[str, float]]
) -> None:
    at = data.draw(st.integers(0, len(steps)))
    bad = {**data.draw(readings), data.draw(st.sampled_from(NAMES)): data.draw(non_finite)}
    expected = replay(DETECTORS[name](CONFIG, FLOORS), steps)
    found = replay(DETECTORS[name](CONFIG, FLOORS), [*steps[:at], bad, *steps[at:]])
    assert found[:at] + found[at + 1 :] == expected


def test_that_check_can_fail() -> None:
    """A baseline that learns every value stops firing after one infinite value."""

    class Gullible:
        level = 1.0

        def judge(self, value: float) -> bool:
            fired = value > 2.5 * self.level
            self.level += 0.1 * (value - self.level)
            return fired

    clean, hit = Gullible(), Gullible()
    hit.judge(math.inf)
    assert clean.judge(100.0) != hit.judge(100.0)


@every_detector
@settings(max_examples=50, deadline=None)
@given(steps=st.lists(readings, min_size=1, max_size=20))
def test_order_of_the_readings_does_not_matter(name: str, steps: list[dict[str, float]]) -> None:
    backwards = [dict(reversed(step.items())) for step in steps]
    assert replay(DETECTORS[name](CONFIG, FLOORS), steps) == replay(
        DETECTORS[name](CONFIG, FLOORS), backwards
    )


@every_detector
@settings(max_examples=50, deadline=None)
@given(before=st.lists(readings, max_size=15), after=st.lists(readings, max_size=15))
def test_state_through_json_continues_bit_for_bit(
    name: str, before: list[dict[str, float]], after: list[dict[str, float]]
) -> None:
    original, resumed = DETECTORS[name](CONFIG, FLOORS), DETECTORS[name](CONFIG, FLOORS)
    replay(original, before)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    assert replay(resumed, after) == replay(original, after)
    assert resumed.state_dict() == original.state_dict()


@every_detector
def test_saved_state_is_a_copy(name: str) -> None:
    detector = calibrated(name)
    saved = detector.state_dict()
    kept = copy.deepcopy(saved)
    detector.judge(dict.fromkeys(NAMES, CALM * 1.1))
    assert saved == kept


@every_detector
@pytest.mark.parametrize(
    "damage",
    [
        lambda state: None,
        lambda state: [],
        lambda state: {},
        lambda state: {**state, "version": 2},
        lambda state: {**state, "version": True},
        lambda state: {**state, "version": "1"},
        lambda state: {**state, "detector": "sigma_growth"},
        lambda state: {**state, "surprise": 1},
        lambda state: {k: v for k, v in state.items() if k != "version"},
        lambda state: {k: v for k, v in state.items() if k != "detector"},
        lambda state: {k: v for k, v in state.items() if k != "baselines"} | {"x": 1},
        lambda state: {**state, "baselines": {"a": {"level": math.nan}}},
        lambda state: {**state, "baselines": {"a": 1.0}} | {"detector": None},
    ],
)
def test_bad_state_is_refused_and_changes_nothing(name: str, damage: object) -> None:
    detector = calibrated(name)
    before = copy.deepcopy(detector.state_dict())
    assert callable(damage)
    with pytest.raises(StateError, match=name):
        detector.load_state_dict(damage(before))
    assert detector.state_dict() == before


@every_detector
def test_a_negative_reading_is_refused(name: str) -> None:
    detector = calibrated(name)
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(ConfigurationError, match="negative"):
        detector.judge({"a": CALM, "b": -1.0})
    assert detector.state_dict() == before


@every_detector
def test_readings_are_not_changed_and_the_judgement_is_frozen(name: str) -> None:
    given_readings = dict.fromkeys(NAMES, CALM)
    judgement = calibrated(name).judge(given_readings)
    assert given_readings == dict.fromkeys(NAMES, CALM)
    assert isinstance(judgement, Judgement)
    with pytest.raises(AttributeError):
        judgement.value = 2.0  # type: ignore[misc]
