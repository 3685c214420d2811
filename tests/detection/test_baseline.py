from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pss.detection.detectors import Baseline
from hf_pss.errors import StateError

non_negative = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)

# Worst case of 80000 sequences of 60 values (scattered, close together, constant): 2.4e-15, from
# one rounding of each product and each sum, faded by alpha.
CLOSED_FORM_TOLERANCE = 5e-15


def make(alpha: float = 0.1, calibration_steps: int = 3, patience_steps: int = 5) -> Baseline:
    return Baseline(alpha, calibration_steps, patience_steps)


def learned(values: list[float], alpha: float = 0.1) -> Baseline:
    baseline = make(alpha)
    for value in values:
        baseline.accept(value)
    return baseline


def closed_form(values: list[float], alpha: float) -> float:
    """The same average as one sum: (1-α)^(t-1) g_1 + Σ α (1-α)^(t-i) g_i."""
    last = len(values) - 1
    weights = [alpha * (1 - alpha) ** (last - i) for i in range(len(values))]
    weights[0] = (1 - alpha) ** last
    return math.fsum(w * g for w, g in zip(weights, values, strict=True))


def relative_error(found: float, expected: float) -> float:
    return abs(found - expected) / expected


@given(
    st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=60),
    st.floats(min_value=0.01, max_value=1.0),
)
def test_level_is_the_weighted_sum(values: list[float], alpha: float) -> None:
    error = relative_error(learned(values, alpha).level, closed_form(values, alpha))
    assert error <= CLOSED_FORM_TOLERANCE


def test_closed_form_check_can_fail() -> None:
    values = [1.0, 2.0, 4.0]
    slightly_off = closed_form(values, 0.1 * (1 + 1e-13))
    assert relative_error(learned(values, 0.1).level, slightly_off) > CLOSED_FORM_TOLERANCE


def test_first_value_starts_without_bias_to_zero() -> None:
    assert learned([7.0]).level == 7.0
    assert learned([7.0] * 30).level == pytest.approx(7.0, rel=1e-14)


def test_weight_of_the_first_value_after_calibration_is_as_the_docstring_says() -> None:
    assert learned([1.0] + [0.0] * 19, 0.1).level == pytest.approx(0.135, abs=5e-4)


@given(st.lists(non_negative, min_size=1, max_size=40), st.floats(min_value=1e-6, max_value=1.0))
def test_level_stays_finite_and_among_the_values(values: list[float], alpha: float) -> None:
    level = learned(values, alpha).level
    assert math.isfinite(level)
    assert 0.0 <= level <= max(values)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7, 1 / 3, 1.0])
def test_average_of_the_largest_floats_does_not_overflow(alpha: float) -> None:
    assert learned([sys.float_info.max] * 50, alpha).level <= sys.float_info.max


def test_is_calibrated_after_the_stated_number_of_values() -> None:
    baseline = make(calibration_steps=3)
    states = []
    for _ in range(4):
        states.append(baseline.is_calibrated)
        baseline.accept(1.0)
    assert states == [False, False, False, True]


@pytest.mark.parametrize("nothing", [0.0, 5e-324, 1e-310])
def test_zero_and_denormal_levels_compare_with_nothing_and_restart(nothing: float) -> None:
    baseline = learned([nothing] * 10)
    assert baseline.ratio(0.0) is None
    assert baseline.ratio(1.0) is None
    assert not baseline.is_calibrated
    baseline.accept(3.0)
    assert (baseline.level, baseline.num_accepted) == (3.0, 1)


def test_no_baseline_yet_has_no_ratio() -> None:
    assert make().ratio(1.0) is None


def test_ratio_that_overflows_is_inf() -> None:
    assert learned([1e-300]).ratio(1e300) == math.inf


def test_patience_counts_refusals_in_a_row_and_then_restarts() -> None:
    baseline = learned([1.0] * 5)
    assert [baseline.refuse(10.0) for _ in range(4)] == [False] * 4
    assert baseline.level == learned([1.0] * 5).level
    baseline.accept(1.0)
    assert [baseline.refuse(10.0) for _ in range(5)] == [False] * 4 + [True]
    assert (baseline.level, baseline.num_accepted, baseline.num_refused) == (10.0, 1, 0)
    assert not baseline.is_calibrated


def test_state_comes_back_exactly() -> None:
    baseline = learned([0.1, 0.7, 1e-17, 3.3])
    baseline.refuse(99.0)
    assert make().with_state(baseline.state(), what="it") == baseline


@pytest.mark.parametrize(
    "change",
    [
        {"level": -1.0},
        {"level": math.nan},
        {"level": math.inf},
        {"level": 10**400},
        {"level": "1"},
        {"level": True},
        {"num_accepted": 0},
        {"num_accepted": 1.0},
        {"num_refused": -1},
        {"num_refused": None},
        {"more": 1},
    ],
)
def test_damaged_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(StateError, match=next(iter(change))):
        make().with_state({**learned([1.0]).state(), **change}, what="it")
