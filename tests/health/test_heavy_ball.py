"""Exceptional points against the companion matrix that they belong to."""

from __future__ import annotations

import math

import pytest
import torch

from hf_pss.errors import ConfigurationError
from hf_pss.health.update_operator import exceptional_distance, exceptional_points

# Near a double root of z² − tr z + β rounding moves both by its own root: √ε = 1.5e-8 in float64.
DOUBLE_ROOT_TOLERANCE = 1.2e-7  # 4.2e-8


def eigenvalues(curvature: float, lr: float, beta: float) -> torch.Tensor:
    companion = [[1 + beta - lr * curvature, -beta], [1.0, 0.0]]
    return torch.linalg.eigvals(torch.tensor(companion, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("lr", [1e-3, 0.7])
def test_both_eigenvalues_coincide_there(lr: float, beta: float) -> None:
    for point in exceptional_points(lr, beta):
        first, second = eigenvalues(point, lr, beta)
        assert float((first - second).abs()) <= DOUBLE_ROOT_TOLERANCE
        assert float(first.abs()) == pytest.approx(math.sqrt(beta), abs=DOUBLE_ROOT_TOLERANCE)


def test_between_them_it_oscillates_and_beyond_it_does_not() -> None:
    lower, upper = exceptional_points(0.1, 0.9)
    assert float(eigenvalues((lower + upper) / 2, 0.1, 0.9).imag.abs().min()) > 0.1
    for beyond in (lower * 0.9, upper * 1.01):
        assert float(eigenvalues(beyond, 0.1, 0.9).imag.abs().max()) == 0


@pytest.mark.parametrize("lr", [1e-3, 0.7])
def test_the_distance_is_zero_there_and_has_no_unit(lr: float) -> None:
    for point in exceptional_points(lr, 0.9):
        assert exceptional_distance(point, lr, 0.9) == 0
        assert exceptional_distance(point * 1.01, lr, 0.9) == pytest.approx(0.01)
    assert exceptional_distance(-1.0, lr, 0.9) > 1
    assert math.isnan(exceptional_distance(math.nan, lr, 0.9))
    assert exceptional_distance(math.inf, lr, 0.9) == math.inf


@pytest.mark.parametrize(("lr", "beta"), [(0.0, 0.9), (math.nan, 0.9), (0.1, 1.0), (0.1, math.nan)])
def test_numbers_without_a_meaning_are_refused(lr: float, beta: float) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        exceptional_points(lr, beta)
