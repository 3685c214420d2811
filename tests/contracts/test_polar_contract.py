"""Every schedule passes this battery; a new one is a row of POLYNOMIAL_SCHEDULES."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_pss.linalg import POLYNOMIAL_SCHEDULES, newton_schulz

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    name: functools.partial(newton_schulz, schedule=name) for name in POLYNOMIAL_SCHEDULES
}
# What fp32 adds to the band, and to a comparison with another order of summation; measured.
BAND_TOLERANCE = 2.5e-6  # 1e-6
ORDER_TOLERANCE = 2.5e-6  # 1e-6
SHAPES = [(1, 7), (7, 1), (1, 1), (12, 30), (30, 12), (16, 16), (3, 10, 20), (0, 4, 6)]


def matrices(*shape: int) -> Tensor:
    """Return matrices whose singular values, relative to ‖W‖_F, lie inside every interval."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    matrix: Tensor = (u * torch.linspace(1.0, 0.05, min(shape[-2:]))) @ vh
    return matrix


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_singular_values_end_in_the_band(method: str, shape: tuple[int, ...], scale: float) -> None:
    weight = matrices(*shape) * scale
    original = weight.clone()
    factor = METHODS[method](weight)
    assert factor.shape == weight.shape
    assert factor.dtype == torch.float32
    assert torch.equal(weight, original)
    sigma = torch.linalg.svdvals(factor.double())
    low, high = POLYNOMIAL_SCHEDULES[method].band
    assert (sigma >= low - BAND_TOLERANCE).all()
    assert (sigma <= high + BAND_TOLERANCE).all()


@pytest.mark.parametrize("method", METHODS)
def test_singular_vectors_are_those_of_the_matrix(method: str) -> None:
    """UVᵀ and a polynomial of W have WᵀX symmetric and positive semi-definite."""
    weight = matrices(30, 12)
    product = weight.mT @ METHODS[method](weight)
    assert (product - product.mT).abs().max() <= ORDER_TOLERANCE
    assert torch.linalg.eigvalsh(product).min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_transposed_input_gives_transposed_output(method: str) -> None:
    weight = matrices(30, 12)
    difference = METHODS[method](weight.mT) - METHODS[method](weight).mT
    assert difference.abs().max() <= ORDER_TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(method: str) -> None:
    weight = matrices(3, 10, 20)
    looped = torch.stack([METHODS[method](matrix) for matrix in weight])
    assert (METHODS[method](weight) - looped).abs().max() <= ORDER_TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    factor = METHODS[method](matrices(12, 20).to(dtype))
    assert factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero(method: str) -> None:
    assert torch.equal(METHODS[method](torch.zeros(2, 5, 4)), torch.zeros(2, 5, 4))


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_input_is_never_turned_into_numbers(method: str) -> None:
    weight = matrices(3, 10, 20)
    weight[1, 2, 3] = torch.inf
    assert METHODS[method](weight).isnan().all(-1).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_the_band_check_can_fail(method: str) -> None:
    """One step short of the schedule, or one part in 10⁵ off, leaves the band."""
    low, high = POLYNOMIAL_SCHEDULES[method].band
    factor = METHODS[method](matrices(16, 16)) * (1 + 2 * (high - low + 1e-5))
    assert torch.linalg.svdvals(factor).max() > high + BAND_TOLERANCE
