from __future__ import annotations

import math

import pytest
import torch

from hf_pss.linalg import POLYNOMIAL_SCHEDULES


@pytest.mark.parametrize("name", POLYNOMIAL_SCHEDULES)
def test_the_band_is_measured(name: str) -> None:
    schedule = POLYNOMIAL_SCHEDULES[name]
    low, high = (math.log10(edge) for edge in schedule.interval)
    x = torch.logspace(low, high, 200_001, dtype=torch.float64)
    for a, b, c in schedule.coefficients:
        x = a * x + b * x**3 + c * x**5
    assert x.min() >= schedule.band[0]
    assert x.max() <= schedule.band[1]
    # A band three times as wide as the measured one would prove nothing.
    seen = max(1 - x.min().item(), x.max().item() - 1)
    stated = max(1 - schedule.band[0], schedule.band[1] - 1)
    assert stated <= max(3 * seen, 2e-14)


@pytest.mark.parametrize("name", POLYNOMIAL_SCHEDULES)
def test_steps_stop_early_or_repeat_the_last(name: str) -> None:
    schedule = POLYNOMIAL_SCHEDULES[name]
    count = len(schedule.coefficients)
    assert schedule.steps(None) == schedule.coefficients
    assert schedule.steps(2) == schedule.coefficients[:2]
    assert schedule.steps(count + 2)[count - 1 :] == schedule.coefficients[-1:] * 3
    assert schedule.source
