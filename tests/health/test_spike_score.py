"""SpikeScore against its definition, written as a loop over a list."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from hf_pss.errors import StateError
from hf_pss.health.step_series import SpikeScore


def oracle(values: list[float], window: int, recent: int) -> tuple[float, int]:
    """Return the score and the number of values that are not finite."""
    spikes, bad = [], []
    for i, value in enumerate(values):
        past = [x for x in values[:i] if math.isfinite(x)][-window:]
        is_full = len(past) == window
        is_high = is_full and value > statistics.fmean(past) + 6 * statistics.pstdev(past)
        bad.append(not math.isfinite(value))
        spikes.append(bad[-1] or is_high)
    return sum(spikes[-recent:]) / len(spikes[-recent:]), sum(bad[-recent:])


def series(num_steps: int, seed: int) -> list[float]:
    """Return noise around a falling loss, with spikes, NaN and inf."""
    rng = random.Random(seed)
    values = [3 + 2 / (1 + i / 50) + rng.gauss(0, 0.1) for i in range(num_steps)]
    for i, extra in zip(
        range(0, num_steps, 37), [0.5, 2.0, 50.0, math.nan, math.inf] * 9, strict=False
    ):
        values[i] += extra
    return values


@pytest.mark.parametrize("seed", range(5))
def test_it_is_that_of_the_definition(seed: int) -> None:
    values = series(900, seed)
    score = SpikeScore(window_size=128, num_recent_steps=300)
    for i, value in enumerate(values):
        score.update(value)
        if i % 150 == 149:
            assert (score.score, score.num_nonfinite) == oracle(values[: i + 1], 128, 300)
    assert score.num_nonfinite > 0
    assert score.score > 0


def test_nan_does_not_hide_later_spikes() -> None:
    score = SpikeScore()
    rng = random.Random(0)
    for _ in range(200):
        assert not score.update(rng.gauss(1, 0.1))
    assert score.update(math.nan)
    assert score.update(50.0)
    assert not score.update(1.0)
    assert score.num_nonfinite == 1


def test_a_constant_series_and_a_window_that_is_not_full_have_no_spikes() -> None:
    score = SpikeScore(window_size=8)
    assert math.isnan(score.score)
    assert not any(score.update(10.0**i) for i in range(8))
    constant = SpikeScore(window_size=8)
    assert not any(constant.update(2.0) for _ in range(20))
    assert not constant.update(3.0)
    assert constant.score == 0


@pytest.mark.parametrize("scale", [1e-5, 1e300])
def test_values_of_any_scale_are_compared_alike(scale: float) -> None:
    score = SpikeScore(window_size=16)
    rng = random.Random(1)
    for _ in range(50):
        assert not score.update(scale * rng.uniform(0.9, 1.1))
    assert score.update(scale * 3)


def test_spikes_count_for_the_recent_steps_only() -> None:
    score = SpikeScore(window_size=2, num_recent_steps=10)
    score.update(math.inf)
    for _ in range(9):
        score.update(1.0)
    assert (score.score, score.num_nonfinite) == (0.1, 1)
    score.update(1.0)
    assert (score.score, score.num_nonfinite) == (0, 0)


def test_a_resumed_score_equals_an_uninterrupted_one() -> None:
    values = series(600, 9)
    whole = SpikeScore(window_size=64, num_recent_steps=250)
    first = SpikeScore(window_size=64, num_recent_steps=250)
    flags = [whole.update(value) for value in values]
    found = [first.update(value) for value in values[:333]]
    saved = json.loads(json.dumps(first.state(), allow_nan=False))
    second = SpikeScore(window_size=64, num_recent_steps=250).restore(saved)
    found += [second.update(value) for value in values[333:]]
    assert found == flags
    assert second.state() == whole.state()
    assert second.score == whole.score


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"window": [1.0, None]},
        {"window": 3},
        {"spikes": [0.5]},
        {"num_steps": -1},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    score = SpikeScore(window_size=4)
    score.update(1.0)
    before = score.state()
    with pytest.raises(StateError):
        score.restore({**before, **change})
    with pytest.raises(StateError):
        score.restore("nothing")
    assert score.state() == before
