"""Cheap leading triplets: never too high, consistent whatever has not converged, never a raise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from spectra import SCALES, check, exponents, noise, seeds, shapes, with_spectrum
from torch import Tensor

from hf_pss.linalg import Triplets, leading_triplets, quick_triplets

VALUES_SMALL, VALUES_LARGE, LARGE = 8, 16, 128  # how many come back, below and from this size on

# Relative to σ₁, against a float64 SVD.
ABOVE = 1e-6  # 4.3e-7
EXACT_SIDE = 3e-6  # 1.0e-6, ‖WᵀU − VΣ‖, or ‖WV − UΣ‖ of large ones
ORTHONORMAL = 4e-6  # 1.3e-6
TAIL = 2e-6  # 7.4e-7
# How far values lie below the true ones, relative to themselves.
NOISE_SIGMA_1 = 0.1  # 0.047, the worst of 48 matrices of i.i.d. noise, 64×64
NOISE_MEAN = 0.04  # 0.020, their mean
WIDE_NOISE_SIGMA_1 = 0.03  # 0.013, 768×768
SPIKED_SIGMA = 4e-6  # 1.6e-6, the three spikes on noise
SPIKED_COSINE = 2.5e-6  # 8.3e-7, 1 − |cos| to the thorough vectors, 300×200
BF16 = 1e-7  # 0, against the same values in float32

# Above the edge √m + √n of the noise that they stand out of.
SPIKES = torch.tensor([6.0, 5.0, 4.0])


def exact(weight: Tensor, k: int) -> Tensor:
    values: Tensor = torch.linalg.svdvals(weight.double())
    return values[..., :k]


def num_values(*shape: int) -> int:
    return min(VALUES_SMALL if min(shape) < LARGE else VALUES_LARGE, *shape)


def shortfall(triplets: Triplets, weight: Tensor) -> Tensor:
    """Share by which each value lies below the true one; negative above it."""
    true = exact(weight, triplets.sigma.shape[-1])
    return 1 - triplets.sigma.double() / true


def spiked(count: int, m: int, n: int) -> Tensor:
    edge = math.sqrt(m) + math.sqrt(n)
    spikes = [with_spectrum(SPIKES * edge, m, n, seed=10 * i) for i in range(count)]
    return noise(count, m, n) + torch.stack(spikes).float()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, exponents, seeds)
def test_consistent_at_any_shape_and_scale(
    shape: tuple[int, int], exponent: int, seed: int
) -> None:
    weight = noise(*shape, seed=seed) * 10.0**exponent
    triplets, rest = quick_triplets(weight)
    k = num_values(*shape)
    assert triplets.u.shape == (shape[0], k)
    assert triplets.v.shape == (shape[1], k)
    top = exact(weight, 1)
    check((triplets.sigma.double() - exact(weight, k)) / top, ABOVE)
    assert (triplets.sigma.diff() <= 0).all()
    u, sigma, v = (t.double() for t in (triplets.u, triplets.sigma, triplets.v))
    sides = [(weight.double() @ v - u * sigma), (weight.double().mT @ u - v * sigma)]
    left_out = torch.stack([side.norm(dim=-2) for side in sides])
    check(left_out.min(dim=0).values / top, EXACT_SIDE)
    for columns in (u, v):
        check((columns.mT @ columns - torch.eye(k, dtype=torch.float64)).abs(), ORTHONORMAL)
    left = (weight.double() - (u * sigma) @ v.mT).norm()
    check((rest.double() - left).abs() / top, TAIL)


def test_error_band_on_noise() -> None:
    triplets, _ = quick_triplets(noise(48, 64, 64))
    low = shortfall(triplets, noise(48, 64, 64))[:, 0]
    check(low, NOISE_SIGMA_1)
    check(low.mean(), NOISE_MEAN)
    assert low.min() > 0  # the band is real: nothing has converged here


def test_error_band_on_wide_noise() -> None:
    weight = noise(2, 768, 768)
    check(shortfall(quick_triplets(weight)[0], weight)[:, 0], WIDE_NOISE_SIGMA_1)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 256), (256, 64)])
def test_error_band_where_directions_stand_out(m: int, n: int) -> None:
    weight = spiked(16, m, n)
    triplets, _ = quick_triplets(weight)
    check(shortfall(triplets, weight)[:, :3].abs(), SPIKED_SIGMA)


def test_more_rounds_are_nearer() -> None:
    weight = noise(48, 64, 64)
    errors = [shortfall(quick_triplets(weight, num_rounds=r)[0], weight) for r in (1, 3, 12)]
    means = [float(error[:, 0].mean()) for error in errors]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("m", "n"), [(1, 7), (7, 1), (1, 1), (5, 200), (200, 5), (9, 9)])
def test_few_rows_or_columns_are_exact(m: int, n: int, scale: float) -> None:
    """With no more than k of them the block holds all there is."""
    weight = noise(m, n) * scale
    triplets, _ = quick_triplets(weight, k=9)
    check((triplets.sigma.double() - exact(weight, 9)).abs() / exact(weight, 1), ABOVE)


@pytest.mark.parametrize("rank", [1, 3])
def test_deficient_rank(rank: int) -> None:
    weight = with_spectrum(torch.arange(rank, 0, -1.0), 40, 30).float()
    triplets, rest = quick_triplets(weight)
    check((triplets.sigma.double() - exact(weight, VALUES_SMALL)).abs() / rank, ABOVE)
    check(rest / rank, TAIL)
    assert triplets.u.isfinite().all()
    assert triplets.v.isfinite().all()


def test_zero_matrix() -> None:
    triplets, rest = quick_triplets(torch.zeros(12, 9))
    assert not triplets.sigma.any()
    assert rest == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_gives_nan_and_spoils_no_other(bad: float) -> None:
    weight = noise(3, 20, 12)
    alone, rest_alone = quick_triplets(weight)
    weight[1, 4, 4] = bad
    triplets, rest = quick_triplets(weight)
    assert triplets.sigma[1].isnan().all()
    assert rest[1].isnan()
    for i in (0, 2):
        assert torch.equal(triplets.sigma[i], alone.sigma[i])
        assert torch.equal(rest[i], rest_alone[i])


def test_bfloat16_is_computed_in_float32() -> None:
    weight = spiked(8, 64, 48).bfloat16()
    triplets, _ = quick_triplets(weight)
    assert triplets.sigma.dtype == torch.float32
    check(shortfall(triplets, weight)[:, :3].abs(), SPIKED_SIGMA)
    rounded, _ = quick_triplets(weight.float())
    check((rounded.sigma - triplets.sigma).abs() / rounded.sigma, BF16)


def test_float64_stays_float64() -> None:
    assert quick_triplets(noise(9, 9, dtype=torch.float64))[0].sigma.dtype == torch.float64


def test_the_same_matrix_gives_the_same_and_no_random_state_is_touched() -> None:
    weight = noise(4, 30, 30)
    state = torch.get_rng_state()
    first, second = quick_triplets(weight)[0], quick_triplets(weight)[0]
    assert torch.equal(first.u, second.u)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(64, 64), (200, 140), (140, 200)])
def test_lowering_values_is_a_contraction(shape: tuple[int, int], seed: int) -> None:
    """No singular value of the edited matrix is above that of the matrix, converged or not."""
    weight = noise(*shape, seed=seed)
    triplets, _ = quick_triplets(weight, num_rounds=1)
    lowered = torch.minimum(triplets.sigma, triplets.sigma[-1])
    edited = weight + (triplets.u * (lowered - triplets.sigma)) @ triplets.v.mT
    every = min(shape)
    check((exact(edited, every) - exact(weight, every)) / exact(weight, 1), ABOVE)


def test_quick_and_thorough_triplets_agree_on_strong_directions() -> None:
    weight = spiked(1, 300, 200)[0]
    quick, thorough = quick_triplets(weight)[0], leading_triplets(weight, 3)
    cosines = (quick.u[:, :3] * thorough.u).sum(dim=0).abs()
    check(1 - cosines, SPIKED_COSINE)
