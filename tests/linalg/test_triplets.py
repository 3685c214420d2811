from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from spectra import SCALES, SHAPES, check, decaying, exponents, noise, relative, seeds, shapes
from spectra import with_spectrum as matrix_with
from torch import Tensor

from hf_pss.errors import ConfigurationError, NonFiniteError
from hf_pss.linalg import Triplets, leading_triplets

# Errors of σ and residuals are relative to σ₁; measured worst case beside each.
EXACT_SIGMA = 2e-6  # 7.0e-7
EXACT_RESIDUAL = 3e-6  # 1.1e-6
ORTHONORMAL = 5e-6  # 2.0e-6
ITERATED_SIGMA = 1e-6  # 3.8e-7
NOISE_SIGMA = 0.016  # 0.0055, the 33rd of 33 values
WARM_SIGMA = 6e-7  # 2.2e-7


def sigma_error(triplets: Triplets, weight: Tensor) -> Tensor:
    exact: Tensor = torch.linalg.svdvals(weight.double())
    k = triplets.sigma.shape[-1]
    return (triplets.sigma.double() - exact[..., :k]).abs() / exact[..., :1]


def residual(triplets: Triplets, weight: Tensor) -> Tensor:
    """The norm that is not zero by construction: ‖Wᵀu − σv‖, or ‖W v − σu‖ of a wide matrix."""
    weight, u, v = weight.double(), triplets.u.double(), triplets.v.double()
    if weight.shape[-2] < weight.shape[-1]:
        weight, u, v = weight.mT, v, u
    sigma = triplets.sigma.double().unsqueeze(-2)
    left = (weight.mT @ u - v * sigma).norm(dim=-2)
    return left / sigma[..., 0, :1].clamp_min(1e-300)


def orthonormality_error(columns: Tensor) -> Tensor:
    gram = columns.mT @ columns
    return (gram - torch.eye(gram.shape[-1])).abs().amax(dim=(-2, -1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, exponents, seeds)
def test_small_matrices_are_decomposed_exactly(
    shape: tuple[int, int], exponent: int, seed: int
) -> None:
    weight = noise(*shape, seed=seed) * 10.0**exponent
    triplets = leading_triplets(weight, 5)
    assert triplets.sigma.shape == (min(5, *shape),)
    check(sigma_error(triplets, weight), EXACT_SIGMA)
    check(residual(triplets, weight), EXACT_RESIDUAL)
    check(orthonormality_error(triplets.u), ORTHONORMAL)
    check(orthonormality_error(triplets.v), ORTHONORMAL)


@pytest.mark.parametrize(("m", "n"), [(400, 250), (250, 600), (300, 300)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("k", [1, 17, 33])
def test_iteration_on_a_decaying_spectrum(m: int, n: int, scale: float, k: int) -> None:
    weight = (matrix_with(decaying(min(m, n)), m, n) * scale).float()
    triplets = leading_triplets(weight, k)
    check(sigma_error(triplets, weight), ITERATED_SIGMA)
    assert not triplets.is_exact
    check(orthonormality_error(triplets.u), ORTHONORMAL)
    check(orthonormality_error(triplets.v), ORTHONORMAL)


def test_iteration_on_noise_the_hardest_spectrum() -> None:
    weight = noise(3, 400, 300)
    coarse, fine = (leading_triplets(weight, 33, num_rounds=r) for r in (8, 12))
    check(sigma_error(coarse, weight), NOISE_SIGMA)
    assert sigma_error(fine, weight).max() < sigma_error(coarse, weight).max() / 3


def test_unconverged_values_are_consistent() -> None:
    weight = noise(300, 200)
    triplets = leading_triplets(weight, 20, num_rounds=1)
    ritz = triplets.u.mT @ weight @ triplets.v
    check((ritz - triplets.sigma.diag()).abs() / triplets.sigma[0], EXACT_RESIDUAL)
    assert residual(triplets, weight).min() > 0.01  # nothing has converged here


@pytest.mark.parametrize("shape", [*SHAPES, (3, 90, 120)])
def test_a_batch_is_its_matrices(shape: tuple[int, ...]) -> None:
    weight = noise(*shape)
    whole = leading_triplets(weight, 4)
    k = min(4, *shape[-2:])
    assert whole.u.shape == (*shape[:-1], k)
    assert whole.v.shape == (*shape[:-2], shape[-1], k)
    assert whole.sigma.shape == (*shape[:-2], k)
    sigma = whole.sigma.reshape(-1, k)
    for matrix, row in zip(weight.reshape(-1, *shape[-2:]), sigma, strict=True):
        check((leading_triplets(matrix, 4).sigma - row).abs() / row[0], EXACT_SIGMA)


def test_transposed_input_gives_transposed_output() -> None:
    weight = noise(300, 250)
    one, other = leading_triplets(weight, 10), leading_triplets(weight.mT, 10)
    assert torch.equal(one.sigma, other.sigma)
    assert torch.equal(one.u, other.v)


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(30, 20), (200, 300)])
def test_rank_deficient_and_zero_matrices(rank: int, shape: tuple[int, int]) -> None:
    sigma = torch.zeros(min(shape)).double()
    sigma[:rank] = torch.linspace(3, 1, rank)
    weight = matrix_with(sigma, *shape).float()
    triplets = leading_triplets(weight, 9)
    check((triplets.sigma.double() - sigma[:9]).abs() / 3, EXACT_SIGMA)
    check(residual(triplets, weight), EXACT_RESIDUAL)
    check(orthonormality_error(triplets.u), ORTHONORMAL)
    check(orthonormality_error(triplets.v), ORTHONORMAL)


def test_more_equal_values_than_the_block_is_wide() -> None:
    sigma = torch.ones(200).double()
    sigma[:20] = 4.0
    weight = matrix_with(sigma, 250, 200).float()
    triplets = leading_triplets(weight, 20)
    check((triplets.sigma - 4).abs() / 4, EXACT_SIGMA)
    check(residual(triplets, weight), EXACT_RESIDUAL)


def test_a_collapsed_matrix_keeps_the_rest_visible() -> None:
    """σ₁ is 10⁵ times the rest: multiplying by WᵀW in fp32 at once would lose it."""
    sigma = torch.ones(200).double()
    sigma[0], sigma[1], sigma[2] = 1e5, 9.0, 7.0
    triplets = leading_triplets(matrix_with(sigma, 200, 260).float(), 3)
    assert triplets.sigma[1:].tolist() == pytest.approx([9.0, 7.0], rel=0.02)


def test_k_in_the_hundreds() -> None:
    weight = matrix_with(decaying(768), 768, 900).float()
    triplets = leading_triplets(weight, 100)
    check(sigma_error(triplets, weight), ITERATED_SIGMA)
    check(orthonormality_error(triplets.u), ORTHONORMAL)


def test_a_warm_start_saves_rounds_and_a_broken_one_does_no_harm() -> None:
    weight = matrix_with(decaying(200), 250, 200).float()
    for matrix in (weight, weight.mT.contiguous()):
        kept = leading_triplets(matrix, 20, num_rounds=10).v
        nearby = matrix + 1e-4 * noise(*matrix.shape, seed=3) / 200
        cold = leading_triplets(nearby, 10, num_rounds=1)
        warm = leading_triplets(nearby, 10, num_rounds=1, start=kept)
        check(sigma_error(warm, nearby), WARM_SIGMA)
        assert sigma_error(cold, nearby).max() > 10 * WARM_SIGMA
        kept[:, 3], kept[:, 4] = math.nan, 0.0
        spoilt = leading_triplets(nearby, 10, start=kept)
        check(sigma_error(spoilt, nearby), ITERATED_SIGMA)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_matrices(bad: float) -> None:
    weight = noise(3, 9, 5)
    weight[1, 4, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 \(first at \[1\]\)"):
        leading_triplets(weight, 2)
    with pytest.raises(NonFiniteError, match="not finite"):
        leading_triplets(weight[1], 2)
    triplets = leading_triplets(weight, 2, check_finite=False)
    assert triplets.sigma.isnan().all(-1).tolist() == [False, True, False]


def test_deterministic_and_without_touching_the_global_random_state() -> None:
    weight = noise(300, 200)
    original = weight.clone()
    before = torch.get_rng_state()
    first, second = leading_triplets(weight, 9), leading_triplets(weight, 9)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.u, second.u)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = noise(300, 250, dtype=dtype)
    triplets = leading_triplets(weight, 3)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert triplets.u.dtype == triplets.sigma.dtype == expected
    check(relative(triplets.sigma, leading_triplets(weight.double(), 3).sigma), EXACT_SIGMA)


def test_gradients_are_not_followed() -> None:
    weight = noise(6, 5).requires_grad_()
    assert not leading_triplets(weight, 2).sigma.requires_grad


@pytest.mark.parametrize("options", [{"k": 0}, {"num_rounds": -1}, {"start": torch.zeros(4, 2)}])
def test_meaningless_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        leading_triplets(noise(6, 5), **{"k": 2, **options})  # type: ignore[arg-type]


def test_the_check_can_fail() -> None:
    weight = noise(20, 30)
    triplets = leading_triplets(weight * (1 + 1e-5), 5)
    with pytest.raises(AssertionError, match="above the tolerance"):
        check(sigma_error(triplets, weight), EXACT_SIGMA)
