from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from spectra import SCALES, SHAPES, check, decaying, exponents, noise, relative, seeds, shapes
from spectra import with_spectrum as matrix_with
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import (
    effective_rank,
    frobenius_norm,
    noise_stable_rank,
    quick_stable_rank,
    spectral_norm,
    stable_rank,
)

# Relative to the float64 value; measured worst case beside each.
NORM_TOLERANCE = 8e-7  # 2.8e-7
RANK_TOLERANCE = 1.8e-6  # 6.4e-7
QUICK_SMALL = 0.005  # 0.0021
QUICK_LARGE = 0.08  # 0.039, at 768×768
QUICK_COLLAPSED = 1.2e-5  # 4.3e-6


def exact_sigma(weight: Tensor) -> Tensor:
    sigma: Tensor = torch.linalg.svdvals(weight.double())
    return sigma


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, exponents, seeds)
def test_norms_and_ranks_agree_with_float64(
    shape: tuple[int, int], exponent: int, seed: int
) -> None:
    weight = noise(*shape, seed=seed) * 10.0**exponent
    sigma = exact_sigma(weight)
    check(relative(frobenius_norm(weight), sigma.norm()), NORM_TOLERANCE)
    check(relative(spectral_norm(weight), sigma[0]), NORM_TOLERANCE)
    check(relative(stable_rank(weight), (sigma / sigma[0]).square().sum()), RANK_TOLERANCE)
    p = sigma / sigma.sum()
    check(relative(effective_rank(weight), torch.special.entr(p).sum().exp()), RANK_TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_is_its_matrices(shape: tuple[int, ...], scale: float) -> None:
    weight = noise(*shape) * scale
    for function in (frobenius_norm, spectral_norm, stable_rank, quick_stable_rank, effective_rank):
        whole = function(weight)
        assert whole.shape == shape[:-2]
        assert whole.dtype == torch.float32
        matrices = weight.reshape(-1, *shape[-2:])
        for matrix, value in zip(matrices, whole.reshape(-1), strict=True):
            check(relative(value, function(matrix)), RANK_TOLERANCE)


@pytest.mark.parametrize("shape", [(32, 64, 64), (8, 256, 64), (8, 64, 256), (4, 40, 40)])
def test_quick_stable_rank_is_close_and_from_above_on_small_noise(shape: tuple[int, ...]) -> None:
    weight = noise(*shape)
    exact = stable_rank(weight.double())
    quick = quick_stable_rank(weight)
    check(relative(quick, exact), QUICK_SMALL)
    check((exact - quick.double()) / exact, RANK_TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 768, 768), (1, 768, 3072), (4, 128, 128), (2, 256, 1024)])
def test_quick_stable_rank_is_close_and_from_above_on_large_noise(shape: tuple[int, ...]) -> None:
    weight = noise(*shape)
    exact = stable_rank(weight.double())
    quick = quick_stable_rank(weight)
    check(relative(quick, exact), QUICK_LARGE)
    check((exact - quick.double()) / exact, RANK_TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 300, 200), (2, 200, 300)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-90])
def test_the_norm_starts_from_guesses_of_the_longer_side(
    shape: tuple[int, ...], scale: float
) -> None:
    weight = noise(*shape) * scale
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    longer = (u if shape[-2] > shape[-1] else vh.mT)[..., :1].float()
    found = spectral_norm(weight, num_rounds=1, start=longer)
    check(relative(found, sigma[..., 0]), NORM_TOLERANCE)
    cold = spectral_norm(weight, num_rounds=1)
    assert bool((relative(cold, sigma[..., 0]) > 0.05).all())


@pytest.mark.parametrize(("m", "n"), [(64, 64), (300, 200), (200, 700)])
def test_quick_stable_rank_is_exact_where_it_matters(m: int, n: int) -> None:
    collapsed = decaying(min(m, n))
    collapsed[0] = 30.0
    weight = matrix_with(collapsed, m, n).float()
    check(relative(quick_stable_rank(weight), stable_rank(weight.double())), QUICK_COLLAPSED)


def test_more_rounds_come_closer() -> None:
    weight = noise(200, 200)
    exact = spectral_norm(weight.double())
    errors = [float(relative(spectral_norm(weight, num_rounds=q), exact)) for q in (1, 3, 9)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_is_nan_alone(bad: float) -> None:
    weight = noise(3, 9, 5)
    weight[1, 4, 2] = bad
    for function in (frobenius_norm, spectral_norm, stable_rank, quick_stable_rank, effective_rank):
        assert function(weight).isnan().tolist() == [False, True, False]
        assert torch.equal(function(weight)[0], function(noise(3, 9, 5))[0])


def test_the_zero_matrix_is_zero_everywhere() -> None:
    zero = torch.zeros(2, 70, 80)
    for function in (frobenius_norm, spectral_norm, stable_rank, quick_stable_rank, effective_rank):
        assert function(zero).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = noise(20, 30, dtype=dtype)
    result = stable_rank(weight)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(relative(result, stable_rank(weight.double())), RANK_TOLERANCE)


def test_noise_stable_rank_matches_measured_noise() -> None:
    assert noise_stable_rank(64, 64) == 16.0
    measured = stable_rank(noise(4, 256, 1024)).mean().item()
    assert measured == pytest.approx(noise_stable_rank(256, 1024), rel=0.05)


def test_quick_stable_rank_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second = (quick_stable_rank(noise(4, 100, 90)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 2).long()])
def test_tensors_that_are_not_matrices_are_refused(bad: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        stable_rank(bad)


def test_zero_rounds_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_rounds=0"):
        spectral_norm(noise(3, 3), num_rounds=0)


def test_a_start_for_the_shorter_side_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"start of shape \(70, 2\)"):
        spectral_norm(noise(90, 70), num_rounds=1, start=noise(70, 2))


def test_the_check_can_fail() -> None:
    weight = noise(20, 30)
    with pytest.raises(AssertionError, match="above the tolerance"):
        check(relative(spectral_norm(weight) * (1 + 1e-5), exact_sigma(weight)[0]), NORM_TOLERANCE)
