from __future__ import annotations

import math

import pytest

from hf_pss.detection.detectors import (
    AnyOf,
    Baseline,
    Detector,
    FloorDetector,
    Judgement,
    Quantity,
    RatioDetector,
    Verdict,
)
from hf_pss.errors import ConfigurationError, StateError


def ratio(
    quantity: Quantity = Quantity.GRAD_NORM, *, calibration_steps: int = 3, patience_steps: int = 5
) -> RatioDetector:
    baseline = Baseline(0.1, calibration_steps, patience_steps)
    return RatioDetector(f"{quantity}_ratio", quantity, 2.5, baseline)


def drop() -> RatioDetector:
    return RatioDetector("stable_rank_drop", Quantity.STABLE_RANK, 0.5, Baseline(0.1, 3, 5))


def feed(detector: Detector, *values: float) -> list[Judgement]:
    return [detector.judge({"global": value}) for value in values]


def verdicts(detector: Detector, *values: float) -> list[str]:
    return [judgement.verdict.value for judgement in feed(detector, *values)]


class TestRatio:
    def test_fires_above_the_threshold_and_not_at_it(self) -> None:
        detector = ratio()
        feed(detector, 1.0, 1.0, 1.0)
        above = math.nextafter(2.5, 3.0)
        assert feed(detector, above)[0].verdict is Verdict.SPIKE
        assert feed(detector, 2.5)[0] == Judgement(
            Verdict.NORMAL, "grad_norm_ratio", (), 2.5, 1.0, 2.5
        )

    def test_compares_with_the_baseline_before_this_value(self) -> None:
        detector = ratio()
        feed(detector, 1.0, 1.0, 1.0, 2.0)
        judgement = feed(detector, 1.0)[0]
        assert judgement.baseline == pytest.approx(0.9 * 1.0 + 0.1 * 2.0, rel=1e-15)

    def test_value_that_fired_is_not_learned(self) -> None:
        detector = ratio()
        feed(detector, 1.0, 1.0, 1.0, 100.0, 100.0)
        assert feed(detector, 1.0)[0].baseline == 1.0

    def test_explosion_during_calibration_does_not_fire(self) -> None:
        assert verdicts(ratio(), 1.0, 1e6) == ["calibrating", "calibrating"]

    def test_zeros_never_fire_and_the_first_number_after_them_calibrates(self) -> None:
        zeros = verdicts(ratio(), *[0.0] * 10, 1.0, 1.0, 1.0, 1.0)
        assert zeros == ["calibrating"] * 13 + ["normal"]

    def test_huge_values_neither_overflow_nor_fire(self) -> None:
        assert verdicts(ratio(), *[1e308] * 5)[-1] == "normal"

    def test_lasting_rise_is_accepted_after_patience_and_reported(self) -> None:
        detector = ratio(patience_steps=5)
        feed(detector, 1.0, 1.0, 1.0)
        risen = feed(detector, *[10.0] * 5)
        assert [j.verdict for j in risen] == [Verdict.SPIKE] * 5
        assert [j.new_level for j in risen] == [()] * 4 + [("global",)]
        assert verdicts(detector, 10.0, 10.0, 10.0, 26.0) == [
            "calibrating",
            "calibrating",
            "normal",
            "spike",
        ]

    def test_non_finite_steps_neither_spend_nor_restore_patience(self) -> None:
        detector = ratio(patience_steps=5)
        feed(detector, 1.0, 1.0, 1.0)
        risen = feed(detector, 10.0, 10.0, math.nan, 10.0, 10.0, math.inf, 10.0)
        assert [j.new_level for j in risen] == [()] * 6 + [("global",)]

    def test_matrices_are_judged_each_by_its_own_baseline(self) -> None:
        detector = ratio(Quantity.MATRIX_GRAD_NORM)
        for _ in range(3):
            detector.judge({"a": 1.0, "b": 100.0, "c": 1.0})
        judgement = detector.judge({"a": 3.0, "b": 120.0, "c": 9.0})
        assert judgement.fired == ("c", "a")
        assert (judgement.value, judgement.threshold) == (9.0, 2.5)

    def test_matrix_that_joins_late_calibrates_by_itself(self) -> None:
        detector = ratio(Quantity.MATRIX_GRAD_NORM)
        for _ in range(3):
            detector.judge({"a": 1.0})
        assert detector.judge({"a": 1.0, "late": 1e9}).verdict is Verdict.NORMAL

    def test_one_non_finite_matrix_keeps_the_whole_step_from_being_learned(self) -> None:
        detector = ratio(Quantity.MATRIX_GRAD_NORM)
        for _ in range(3):
            detector.judge({"a": 1.0, "b": 1.0})
        before = detector.state_dict()
        judgement = detector.judge({"a": 2.0, "b": math.inf})
        assert judgement == Judgement(
            Verdict.NON_FINITE, "matrix_grad_norm_ratio", ("b",), math.inf
        )
        assert detector.state_dict() == before


class TestDrop:
    def test_fires_below_its_share_of_the_baseline_and_not_at_it(self) -> None:
        detector = drop()
        feed(detector, 8.0, 8.0, 8.0)
        assert feed(detector, math.nextafter(4.0, 0.0))[0].verdict is Verdict.SPIKE
        assert feed(detector, 4.0)[0] == Judgement(
            Verdict.NORMAL, "stable_rank_drop", (), 4.0, 8.0, 4.0
        )

    def test_rise_does_not_fire(self) -> None:
        assert verdicts(drop(), 8.0, 8.0, 8.0, 800.0)[-1] == "normal"

    def test_zero_fires_first(self) -> None:
        detector = drop()
        for _ in range(3):
            detector.judge({"a": 8.0, "b": 8.0})
        assert detector.judge({"a": 1.0, "b": 0.0}).fired == ("b", "a")

    def test_slow_decline_as_by_weight_decay_does_not_fire(self) -> None:
        assert "spike" not in verdicts(drop(), *(100.0 * 0.98**t for t in range(200)))


class TestFloor:
    def test_fires_below_the_floor_and_not_at_it(self) -> None:
        detector = FloorDetector({"a": 16.0, "b": 4.0})
        assert detector.judge({"a": 16.0, "b": 4.0}).verdict is Verdict.NORMAL
        assert detector.judge({"a": 15.9, "b": 4.0}) == Judgement(
            Verdict.SPIKE, "stable_rank_floor", ("a",), 15.9, None, 16.0
        )

    def test_sorts_by_how_far_below_in_ratio(self) -> None:
        detector = FloorDetector({"a": 16.0, "b": 4.0, "c": 1.0})
        assert detector.judge({"a": 8.0, "b": 1.0, "c": 0.0}).fired == ("c", "b", "a")

    def test_floor_of_zero_never_fires(self) -> None:
        assert FloorDetector({"a": 0.0}).judge({"a": 0.0}).verdict is Verdict.NORMAL

    def test_never_gives_up(self) -> None:
        detector = FloorDetector({"global": 16.0})
        assert set(verdicts(detector, *[1.0] * 500)) == {"spike"}

    @pytest.mark.parametrize("floors", [{"a": -1.0}, {"a": math.nan}, {"a": math.inf}])
    def test_floors_without_a_meaning_are_refused(self, floors: dict[str, float]) -> None:
        with pytest.raises(ConfigurationError, match="stable-rank floor"):
            FloorDetector(floors)


class TestAnyOf:
    @staticmethod
    def guard() -> AnyOf:
        return AnyOf([ratio(), FloorDetector({"global": 16.0}), drop()])

    def test_passes_readings_to_the_detectors_that_read_them(self) -> None:
        guard = self.guard()
        assert guard.quantities == {Quantity.GRAD_NORM, Quantity.STABLE_RANK}
        for quantity, names in (
            (Quantity.GRAD_NORM, ["grad_norm_ratio"]),
            (Quantity.STABLE_RANK, ["stable_rank_floor", "stable_rank_drop"]),
        ):
            judgements = guard.judge(quantity, {"global": 1.0})
            assert [judgement.detector for judgement in judgements] == names

    @pytest.mark.parametrize("is_floor_first", [True, False])
    def test_detectors_of_one_quantity_do_not_hide_each_other(self, is_floor_first: bool) -> None:
        pair: list[Detector] = [FloorDetector({"a": 16.0, "b": 16.0}), drop()]
        guard = AnyOf(pair if is_floor_first else pair[::-1])
        for _ in range(3):
            guard.judge(Quantity.STABLE_RANK, {"a": 8.0, "b": 50.0})
        judgements = guard.judge(Quantity.STABLE_RANK, {"a": 8.0, "b": 20.0})
        fired = {judgement.detector: judgement.fired for judgement in judgements}
        assert fired == {"stable_rank_floor": ("a",), "stable_rank_drop": ("b",)}
        assert (judgements[0].detector == "stable_rank_floor") is is_floor_first

    def test_the_same_twice_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="only once"):
            AnyOf([ratio(), ratio()])

    def test_none_reads_nothing(self) -> None:
        assert AnyOf([]).quantities == frozenset()

    def test_state_continues_and_a_bad_one_is_refused(self) -> None:
        guard, other = self.guard(), self.guard()
        for value in (20.0, 21.0, 22.0):
            guard.judge(Quantity.GRAD_NORM, {"global": value})
            guard.judge(Quantity.STABLE_RANK, {"global": value})
        saved = guard.state_dict()
        other.load_state_dict(saved)
        assert other.state_dict() == saved
        states = saved["detectors"]
        assert isinstance(states, dict)
        half_bad = {**saved, "detectors": {**states, "stable_rank_drop": {"version": 1}}}
        with pytest.raises(StateError, match="stable_rank_drop"):
            self.guard().load_state_dict(half_bad)

    @pytest.mark.parametrize(
        "state",
        [
            None,
            [],
            {},
            {"version": 2, "detectors": {}},
            {"version": 1},
            {"version": 1, "detectors": {}},
            {"version": 1, "detectors": {"sigma_growth": {}}},
        ],
    )
    def test_damaged_state_is_refused(self, state: object) -> None:
        with pytest.raises(StateError, match="the state of the detectors"):
            self.guard().load_state_dict(state)


def test_state_of_another_detector_is_refused() -> None:
    with pytest.raises(StateError, match="'update_norm_ratio'"):
        ratio().load_state_dict(ratio(Quantity.UPDATE_NORM).state_dict())
