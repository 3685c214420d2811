"""Distance to rank K against a decomposition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.health.spectrum_metrics import (
    low_rank_distance,
    measure_low_rank_distances,
    quick_low_rank_distance,
)
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
BOTH = [low_rank_distance, quick_low_rank_distance]
# Shares in [0, 1], so absolute.
TOLERANCE = 4e-7  # 2.0e-7
ZERO_TOLERANCE = 1.2e-6  # 4.4e-7, what rounding leaves of a matrix of low rank
# A narrow block finds the leading K values of noise, the hardest spectrum, from below.
QUICK_BAND = {64: 0.01, 256: 0.02}  # 0.0033, 0.0072
BFLOAT16_TOLERANCE = 0.0  # widening rounds nothing
SHAPES = [(16, 16), (16, 48), (48, 16), (1, 7), (64, 64)]


def oracle(weight: Tensor, k: int) -> float:
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    nearest = (u[:, :k] * sigma[:k]) @ vh[:k]
    whole = torch.linalg.matrix_norm(weight.double())
    return float(torch.linalg.matrix_norm(weight.double() - nearest) / whole)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_distance_to_the_nearest_matrix_of_rank_k(shape: tuple[int, int], k: int) -> None:
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape)
    assert float(low_rank_distance(weight, k)) == pytest.approx(oracle(weight, k), abs=TOLERANCE)


@pytest.mark.parametrize("side", sorted(QUICK_BAND))
@pytest.mark.parametrize("k", [1, 8, 16])
def test_quickly_it_is_the_same_from_above(side: int, k: int) -> None:
    torch.manual_seed(0)
    noise = torch.randn(side, side)
    exact = oracle(noise, k)
    assert exact - TOLERANCE <= float(quick_low_rank_distance(noise, k)) <= exact + QUICK_BAND[side]


@pytest.mark.parametrize("distance", BOTH)
def test_a_matrix_of_rank_k_is_at_zero(distance: Callable[[Tensor, int], Tensor]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 4) @ torch.randn(4, 32)
    assert float(distance(weight, 4)) <= ZERO_TOLERANCE
    assert float(distance(weight, 3)) > 0.1
    assert float(distance(weight, 99)) <= ZERO_TOLERANCE


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_scale_does_not_matter(distance: Callable[[Tensor, int], Tensor], factor: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(20, 30)
    assert torch.equal(distance(weight * factor, 3), distance(weight, 3))


@pytest.mark.parametrize("distance", BOTH)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_harms_no_other_of_its_stack(
    distance: Callable[[Tensor, int], Tensor], bad: float
) -> None:
    torch.manual_seed(3)
    stack = torch.randn(4, 12, 20)
    alone = distance(stack[3], 2)
    stack[0, 1, 1], stack[1] = bad, 0
    found = distance(stack, 2)
    assert math.isnan(float(found[0]))
    assert float(found[1]) == 0
    assert float(found[3]) == pytest.approx(float(alone), abs=TOLERANCE)


@pytest.mark.parametrize("distance", BOTH)
def test_bfloat16_is_measured_as_float32(distance: Callable[[Tensor, int], Tensor]) -> None:
    weight = torch.randn(20, 30).bfloat16()
    difference = distance(weight, 3) - distance(weight.float(), 3)
    assert abs(float(difference)) <= BFLOAT16_TOLERANCE
    assert distance(weight.double(), 3).dtype == torch.float64


@pytest.mark.parametrize("distance", BOTH)
def test_a_rank_below_one_is_refused(distance: Callable[[Tensor, int], Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="give 1 or more"):
        distance(torch.eye(3), 0)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_matrix_of_a_model_is_measured(make: type) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    exact = measure_low_rank_distances(views, parameters, BACKEND, 4, exact=True)
    quick = measure_low_rank_distances(views, parameters, BACKEND, 4)
    assert sorted(exact) == sorted(quick) == sorted(matrix_names(views))
    for view in views:
        expected = oracle(view.read(parameters[view.parameter_name]), 4)
        assert exact[view.name] == pytest.approx(expected, abs=TOLERANCE)
        assert expected - TOLERANCE <= quick[view.name] <= expected + QUICK_BAND[64]
    assert measure_low_rank_distances((), {}, BACKEND, 4) == {}
