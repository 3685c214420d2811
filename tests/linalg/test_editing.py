from __future__ import annotations

import math

import pytest
import torch
from spectra import check, decaying, noise, polar_factor, relative
from spectra import with_spectrum as matrix_with

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import (
    Clip,
    SmoothingFunction,
    SmoothingStatus,
    StableRankCap,
    noise_stable_rank,
    smooth_spectrum,
    stable_rank,
)
from hf_pss.linalg.smoothing import (
    Convolution,
    Hammer,
    Log,
    PolarReset,
    Softmax,
    Softplus,
    Spectrum,
)

EDIT = 2e-6  # 6.7e-7, relative to σ₁
FLOOR = 3e-6  # 1.1e-6
ITERATED_FLOOR = 1.1e-5  # 3.8e-6


def spectrum(*sigma: float, rank: int, tail: float = 0.0, size: int = 10) -> Spectrum:
    return Spectrum(torch.tensor(sigma), torch.tensor(rank), torch.tensor(tail), (size, size))


def test_formulas_by_hand() -> None:
    four = spectrum(8.0, 4.0, 2.0, 1.0, rank=2)
    assert Clip()(four).tolist() == [2, 2, 2, 1]
    assert Hammer()(four).tolist() == [4, 4, 2, 1]
    log2 = math.log(2)
    assert Log()(four).tolist() == pytest.approx([2 * (1 + 2 * log2), 2 * (1 + log2), 2, 1])
    assert Convolution()(four).tolist() == pytest.approx([20 / 3, 14 / 3, 8 / 3, 1])
    soft = [2 * (1 + log2 - math.log1p(math.exp(1 - x))) for x in (4, 2)]
    assert Softplus()(four).tolist() == pytest.approx([*soft, 2, 1])
    weights = [math.exp(x) for x in (1, 0.5, 0.25)]
    shares = [14 * weight / sum(weights) for weight in weights]
    assert Softmax()(four).tolist() == pytest.approx([*shares, 1])
    root = (85 / 4) ** 0.5
    assert PolarReset()(four).tolist() == pytest.approx([root] * 4)


class TooLow(SmoothingFunction):
    """Moves every value to 0.5."""

    def __call__(self, spectrum: Spectrum) -> torch.Tensor:
        return spectrum.sigma.clamp(max=0.5)


@pytest.mark.parametrize(
    ("floor", "level"),
    [
        (1.0, 8.0),  # met already
        (2.0, 21**0.5),  # R_1 / (F − 1) = 21, j = 1
        (3.0, 5**0.5),  # R_2 / (F − 2) = 5, j = 2
        (4.0, 1.0),  # all equal
    ],
)
def test_stable_rank_cap_by_hand(floor: float, level: float) -> None:
    four = spectrum(8.0, 4.0, 2.0, 1.0, rank=2, size=4)
    after = StableRankCap(floor)(four)
    assert after.tolist() == pytest.approx([min(level, sigma) for sigma in (8.0, 4.0, 2.0, 1.0)])


def test_stable_rank_cap_is_the_largest_level_that_reaches_the_floor() -> None:
    weight = torch.stack([matrix_with(decaying(40) ** p, 40, 60) for p in (0.5, 1, 1.5)])
    floor = torch.tensor([12.0, 6.0, 5.0])
    smoothed = smooth_spectrum(weight.float(), StableRankCap(floor))
    check(relative(stable_rank(smoothed.weight), floor), FLOOR)
    check(relative(smoothed.stable_rank_after, floor), FLOOR)
    after, before = (torch.linalg.svdvals(w.double()) for w in (smoothed.weight, weight))
    check((after - before).abs()[:, 20:], EDIT)
    assert (smoothed.status == SmoothingStatus.SMOOTHED).all()


def test_stable_rank_cap_on_large_matrices_reaches_the_floor_by_iteration() -> None:
    weight = matrix_with(3 * decaying(300) ** 0.8, 300, 400).float()
    smoothed = smooth_spectrum(weight, StableRankCap(20.0))
    assert smoothed.status == SmoothingStatus.SMOOTHED
    check(relative(stable_rank(smoothed.weight), torch.tensor(20.0)), ITERATED_FLOOR)


def test_an_unreachable_floor_caps_as_far_as_possible_and_is_reported() -> None:
    weight = matrix_with(decaying(40), 40, 60).float()
    smoothed = smooth_spectrum(weight, StableRankCap(30.0), max_rank=5)
    assert smoothed.status == SmoothingStatus.TRUNCATED
    sigma = smoothed.sigma_before
    check((smoothed.sigma_after - sigma[-1]).abs(), EDIT)
    assert smoothed.stable_rank_before < smoothed.stable_rank_after < 30
    assert smooth_spectrum(weight, StableRankCap(30.0), max_rank=39).stable_rank_after > 29.99


def test_no_value_goes_below_the_computed_ones() -> None:
    weight = matrix_with(torch.linspace(5, 1, 40), 40, 60).float()
    smoothed = smooth_spectrum(weight, TooLow(), max_rank=3)
    assert smoothed.status == SmoothingStatus.TRUNCATED
    check(relative(smoothed.sigma_after, smoothed.sigma_before[-1:].expand(4)), EDIT)
    whole = smooth_spectrum(weight, TooLow(), max_rank=40)
    assert whole.status == SmoothingStatus.SMOOTHED
    check((torch.linalg.svdvals(whole.weight) - 0.5).abs() / 5, EDIT)


def test_the_floor_of_noise_is_the_default() -> None:
    weight = matrix_with(decaying(40), 40, 40).float()
    smoothed = smooth_spectrum(weight, StableRankCap())
    assert smoothed.stable_rank_after.item() == pytest.approx(noise_stable_rank(40, 40), rel=1e-4)


def test_the_floor_survives_a_near_collapse() -> None:
    """‖W‖_F² − σ₁² is below fp32's resolution here; the level must not come from it."""
    sigma = torch.ones(40)
    sigma[0] = 1e5
    smoothed = smooth_spectrum(matrix_with(sigma, 40, 50).float(), StableRankCap(10.0))
    # R_1 / (F − 1) = 39 / 9; the matrix itself stores its small values to 1 part in 10² only.
    assert smoothed.sigma_after[0].item() == pytest.approx((39 / 9) ** 0.5, rel=0.02)


def test_a_rank_two_matrix_is_not_erased_by_a_floor_it_cannot_reach() -> None:
    for shape in ((100, 120), (20, 30)):
        weight = matrix_with(torch.tensor([5.0, 1.0]), *shape).float()
        smoothed = smooth_spectrum(weight, StableRankCap(10.0))
        assert smoothed.status == SmoothingStatus.RANK_DEFICIENT
        assert torch.equal(smoothed.weight, weight)


def test_polar_reset_is_msign() -> None:
    weight = matrix_with(decaying(40), 40, 60).float()
    factor = polar_factor(weight)
    expected = factor * weight.norm() / factor.norm()
    check((smooth_spectrum(weight, PolarReset()).weight - expected).abs(), EDIT)


def test_clip_of_more_dominant_values_than_max_rank_says_truncated() -> None:
    weight = noise(90, 100)
    smoothed = smooth_spectrum(weight, Clip(), max_rank=4)
    assert smoothed.rank == 4
    assert smoothed.stable_rank_before > 5
    assert smoothed.status == SmoothingStatus.TRUNCATED


@pytest.mark.parametrize(
    "make",
    [
        lambda: StableRankCap(0.5),
        lambda: smooth_spectrum(noise(3, 3), Clip(), max_rank=0),
        lambda: smooth_spectrum(noise(3), Clip()),
    ],
)
def test_meaningless_options_are_refused(make: object) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        make()  # type: ignore[operator]


def test_the_check_can_fail() -> None:
    weight = matrix_with(decaying(40), 40, 60).float()
    smoothed = smooth_spectrum(weight, StableRankCap(6.0))
    with pytest.raises(AssertionError, match="above the tolerance"):
        check(relative(smoothed.stable_rank_after, torch.tensor(6.001)), FLOOR)
