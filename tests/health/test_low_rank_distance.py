"""Distance to rank K against a decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor

from hf_pss.health.spectrum_metrics import low_rank_distance, measure_low_rank_distances
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
# Shares in [0, 1], so absolute.
TOLERANCE = 4e-7  # 2.0e-7
ZERO_TOLERANCE = 1.2e-6  # 4.4e-7, what rounding leaves of a matrix of low rank
# Small matrices are decomposed. The leading values of larger noise are found from below.
QUICK_BAND = {64: TOLERANCE, 256: 4e-3}  # 2.0e-7, 0.0014
BFLOAT16_TOLERANCE = 0.0  # widening rounds nothing


def oracle(weight: Tensor, k: int) -> float:
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    nearest = (u[:, :k] * sigma[:k]) @ vh[:k]
    whole = torch.linalg.matrix_norm(weight.double())
    return float(torch.linalg.matrix_norm(weight.double() - nearest) / whole)


@pytest.mark.parametrize("side", sorted(QUICK_BAND))
@pytest.mark.parametrize("k", [1, 8, 16])
def test_it_is_the_distance_to_the_nearest_matrix_of_rank_k_from_above(side: int, k: int) -> None:
    torch.manual_seed(0)
    noise = torch.randn(side, side)
    exact = oracle(noise, k)
    assert exact - TOLERANCE <= float(low_rank_distance(noise, k)) <= exact + QUICK_BAND[side]


def test_a_matrix_of_rank_k_is_at_zero() -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 4) @ torch.randn(4, 32)
    assert float(low_rank_distance(weight, 4)) <= ZERO_TOLERANCE
    assert float(low_rank_distance(weight, 3)) > 0.1
    assert float(low_rank_distance(weight, 99)) <= ZERO_TOLERANCE


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_scale_does_not_matter(factor: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(20, 30)
    assert torch.equal(low_rank_distance(weight * factor, 3), low_rank_distance(weight, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_harms_no_other_of_its_stack(bad: float) -> None:
    torch.manual_seed(3)
    stack = torch.randn(4, 12, 20)
    alone = low_rank_distance(stack[3], 2)
    stack[0, 1, 1], stack[1] = bad, 0
    found = low_rank_distance(stack, 2)
    assert math.isnan(float(found[0]))
    assert float(found[1]) == 0
    assert float(found[3]) == pytest.approx(float(alone), abs=TOLERANCE)


def test_bfloat16_is_measured_as_float32() -> None:
    weight = torch.randn(20, 30).bfloat16()
    difference = low_rank_distance(weight, 3) - low_rank_distance(weight.float(), 3)
    assert abs(float(difference)) <= BFLOAT16_TOLERANCE
    assert low_rank_distance(weight.double(), 3).dtype == torch.float64


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_matrix_of_a_model_is_measured(make: type) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    measured = measure_low_rank_distances(views, parameters, BACKEND, 4)
    assert sorted(measured) == sorted(matrix_names(views))
    for view in views:
        expected = oracle(view.read(parameters[view.parameter_name]), 4)
        assert expected - TOLERANCE <= measured[view.name] <= expected + QUICK_BAND[64]
    assert measure_low_rank_distances((), {}, BACKEND, 4) == {}
