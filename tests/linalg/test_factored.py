"""Products of two factors against the SVD of the whole product."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import SCALES, check, noise
from torch import Tensor

from hf_pss.linalg import (
    SMOOTHING_FUNCTIONS,
    Clip,
    SmoothingStatus,
    product_triplets,
    smooth_product,
    smooth_spectrum,
)

# Relative to σ₁ of the product, against a float64 SVD of the product.
VALUES = 2e-6  # 4.0e-7
PRODUCT = 4e-6  # 1.2e-6, the product of the edited factors
SHAPES = [(20, 3, 12), (12, 4, 30), (5, 5, 5), (3, 8, 6), (40, 1, 9), (9, 16, 200)]


def factors(m: int, r: int, n: int, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(*batch, m, r, seed=seed), noise(*batch, r, n, seed=seed + 1)


@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("m", "r", "n"), SHAPES)
def test_triplets_are_those_of_the_product(
    m: int, r: int, n: int, scale: float, scaling: float
) -> None:
    b, a = factors(m, r, n)
    b = b * scale
    found = product_triplets(b, a, scaling)
    dense = scaling * b.double() @ a.double()
    k = min(m, r, n)
    expected = torch.linalg.svdvals(dense)[:k]
    assert found.sigma.shape == (k,)
    check((found.sigma.double() - expected).abs() / expected[0], VALUES)
    rebuilt = (found.u.double() * found.sigma.double()) @ found.v.double().mT
    check((rebuilt - dense).norm() / expected[0], PRODUCT)


@pytest.mark.parametrize("name", ["clip", "log", "softplus", "softmax", "convolution", "hammer"])
@pytest.mark.parametrize(("m", "r", "n"), [s for s in SHAPES if s[1] > 1 and s[1] <= min(s[::2])])
def test_smoothing_factors_is_smoothing_the_product(name: str, m: int, r: int, n: int) -> None:
    """U φ(Σ) Vᵀ of the product's own SVD, in float64."""
    b, a = factors(m, r, n)
    phi = SMOOTHING_FUNCTIONS[name]()
    found = smooth_product(b, a, phi, scaling=0.5)
    u, sigma, vh = torch.linalg.svd(0.5 * b.double() @ a.double(), full_matrices=False)
    expected = (u[:, :r] * found.sigma_after.double()) @ vh[:r]
    check((0.5 * found.left.double() @ found.right.double() - expected).norm() / sigma[0], PRODUCT)
    assert found.status == SmoothingStatus.SMOOTHED


def test_clip_agrees_with_the_dense_edit() -> None:
    b, a = factors(30, 6, 20)
    found = smooth_product(b, a, Clip(), scaling=2.0)
    # Of rank 6, the dense matrix has the same six values.
    dense = smooth_spectrum(2.0 * b.double() @ a.double(), Clip(), max_rank=5)
    check((2.0 * found.left.double() @ found.right.double() - dense.weight).norm(), 1e-4)
    assert int(found.rank) == int(dense.rank)


def test_both_factors_take_their_half() -> None:
    b, a = factors(30, 4, 20)
    b[:, 0] *= 50
    found = smooth_product(b, a, Clip())
    shrunk = [
        float(after.norm() / before.norm()) for before, after in ((b, found.left), (a, found.right))
    ]
    assert shrunk[0] < 0.5
    assert shrunk[1] < 1


def test_keeping_the_frobenius_norm() -> None:
    b, a = factors(30, 4, 20)
    found = smooth_product(b, a, Clip(), keep_frobenius=True)
    before, after = (b @ a).norm(), (found.left @ found.right).norm()
    check((after - before).abs() / before, PRODUCT)


@pytest.mark.parametrize("what", ["zero", "rank one", "nan", "inf"])
def test_products_that_cannot_be_smoothed_are_returned_bit_for_bit(what: str) -> None:
    b, a = factors(12, 1 if what == "rank one" else 4, 9, 3)
    if what == "zero":
        b[1] = 0
    elif what != "rank one":
        b[1, 2, 0] = math.nan if what == "nan" else math.inf
    found = smooth_product(b, a, Clip())
    assert found.status[1] != SmoothingStatus.SMOOTHED
    assert torch.equal(found.left[1].view(torch.int32), b[1].view(torch.int32))
    assert torch.equal(found.right[1], a[1])
    if what != "rank one":
        assert (found.status[[0, 2]] == SmoothingStatus.SMOOTHED).all(), (
            "one that is broken spoils no other"
        )
    if what == "zero":
        assert found.status[1] == SmoothingStatus.RANK_DEFICIENT


def test_bfloat16_factors_stay_bfloat16() -> None:
    b, a = (factor.bfloat16() for factor in factors(12, 4, 9))
    found = smooth_product(b, a, Clip())
    assert found.left.dtype == found.right.dtype == torch.bfloat16
