"""Every smoothing function passes this battery; a new one is a row of SMOOTHING_FUNCTIONS."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pss.errors import NonFiniteError
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Smoothed, SmoothingStatus, smooth_spectrum
from hf_pss.linalg.smoothing import Spectrum

# What each row promises beyond the common contract.
ABOVE_REFERENCE = {"clip", "log", "softplus", "convolution", "softmax", "hammer"}
SUM_KEPT = {"convolution", "softmax"}
NEVER_RAISED = set(SMOOTHING_FUNCTIONS) - SUM_KEPT - {"polar"}
FROBENIUS_KEPT = {"polar"}

# Relative to σ₁; measured worst case beside each.
VALUE_TOLERANCE = 1.5e-7  # below 5e-8
SUM_TOLERANCE = 5e-7  # below 2e-7
EDIT_TOLERANCE = 2e-6  # 7e-7
BATCH_TOLERANCE = 1.5e-7  # below 5e-8
STABLE_RANK_TOLERANCE = 2e-6  # 7e-7
BFLOAT16_STEP = 2.0**-8  # one rounding to bfloat16, relative to the entry

every_function = pytest.mark.parametrize("name", SMOOTHING_FUNCTIONS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_with(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(noise(m, sigma.numel(), seed=seed).double()).Q
    right = torch.linalg.qr(noise(n, sigma.numel(), seed=seed + 1).double()).Q
    matrix: Tensor = (left * sigma.double()) @ right.mT
    return matrix.float()


def collapsed(*shape: int) -> Tensor:
    """Matrices of noise with one direction (k = 1) or a few (k = 2, 3, …) far above it."""
    weight = noise(*shape)
    m, n = shape[-2:]
    for seed, size in enumerate((12.0, 11.0, 3.0)):
        column, row = noise(*shape[:-2], m, 1, seed=seed + 9), noise(*shape[:-2], 1, n, seed=seed)
        weight = weight + size * column * row / 2**seed
    return weight


def smooth(name: str, weight: Tensor, max_rank: int = 32) -> Smoothed:
    return smooth_spectrum(weight, SMOOTHING_FUNCTIONS[name](), max_rank=max_rank)


@st.composite
def spectra(draw: st.DrawFn) -> Spectrum:
    count = draw(st.integers(2, 12))
    values = st.floats(2.0**-10, 2.0**10, width=32)
    sigma = sorted(draw(st.lists(values, min_size=count, max_size=count)), reverse=True)
    scale = 10.0 ** draw(st.integers(-30, 30))
    rank = draw(st.integers(1, count - 1))
    return Spectrum(
        sigma=torch.tensor(sigma) * scale,
        rank=torch.tensor(rank),
        tail=torch.tensor(0.0),
        shape=(count, count + 3),
    )


@every_function
@settings(max_examples=150, deadline=None, derandomize=True)
@given(spectrum=spectra())
def test_values_keep_their_promises(name: str, spectrum: Spectrum) -> None:
    original = spectrum.sigma.clone()
    after = SMOOTHING_FUNCTIONS[name]()(spectrum)
    assert torch.equal(spectrum.sigma, original)
    assert after.shape == original.shape
    assert after.dtype == original.dtype
    slack = VALUE_TOLERANCE * original[0]
    k = int(spectrum.rank)
    assert (after.diff() <= slack).all()
    assert after[0] <= original[0] + slack
    if name in NEVER_RAISED:
        assert (after <= original).all()
    if name in ABOVE_REFERENCE:
        assert (after[: k + 1] >= original[k] - slack).all()
        assert torch.equal(after[k + 1 :], original[k + 1 :])
    if name in SUM_KEPT:
        difference = (after.double().sum() - original.double().sum()).abs()
        assert difference <= SUM_TOLERANCE * original.double().sum()
    if name in FROBENIUS_KEPT:
        before, now = (values.double().norm() for values in (original, after))
        assert (now - before).abs() <= SUM_TOLERANCE * before


@every_function
def test_the_worst_collapse_is_smoothed(name: str) -> None:
    """k = 1: a φ that refers to the smallest dominant value would be the identity."""
    smoothed = smooth(name, matrix_with(torch.tensor([50.0] + [1.0] * 19), 20, 30))
    assert smoothed.rank == 1
    assert smoothed.changed
    assert smoothed.sigma_after[0] < 0.75 * smoothed.sigma_before[0]
    assert smoothed.stable_rank_after > smoothed.stable_rank_before


@every_function
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (3, 20, 20), (2, 2, 9, 40), (0, 6, 4)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_edit_moves_the_leading_values_and_nothing_else(
    name: str, shape: tuple[int, ...], scale: float
) -> None:
    weight = collapsed(*shape) * scale
    original = weight.clone()
    smoothed = smooth(name, weight)
    assert torch.equal(weight, original)
    assert smoothed.weight.dtype == weight.dtype
    assert smoothed.weight.data_ptr() != weight.data_ptr() or weight.numel() == 0
    count = smoothed.sigma_after.shape[-1]
    expected = torch.linalg.svdvals(weight.double())
    unit = expected[..., :1].clone()
    expected[..., :count] = smoothed.sigma_after.double()
    expected = expected.sort(dim=-1, descending=True).values
    actual = torch.linalg.svdvals(smoothed.weight.double())
    assert ((actual - expected).abs() <= EDIT_TOLERANCE * unit).all()
    stable_rank = (actual / actual[..., :1]).square().sum(-1)
    difference = (smoothed.stable_rank_after - stable_rank).abs() / stable_rank
    # The edit is right to a part of the old σ₁, which is a larger part of the new one.
    assert (difference <= STABLE_RANK_TOLERANCE * unit[..., 0] / actual[..., 0]).all()


@every_function
def test_a_batch_is_its_matrices(name: str) -> None:
    weight = torch.cat([collapsed(2, 20, 30), noise(1, 20, 30), torch.zeros(1, 20, 30)])
    whole = smooth(name, weight)
    for index, matrix in enumerate(weight):
        alone = smooth(name, matrix)
        error = (alone.weight - whole.weight[index]).abs().max()
        assert error <= BATCH_TOLERANCE * alone.sigma_before[0]
        assert alone.status == whole.status[index]
        assert alone.rank == whole.rank[index]


@every_function
def test_transposed_input_gives_transposed_output(name: str) -> None:
    weight = collapsed(20, 30)
    error = (smooth(name, weight.mT).weight.mT - smooth(name, weight).weight).abs().max()
    assert error <= BATCH_TOLERANCE * torch.linalg.matrix_norm(weight, ord=2)


@every_function
def test_matrices_without_a_reference_level_are_left_alone_and_reported(name: str) -> None:
    for weight in (
        torch.zeros(2, 8, 6),
        noise(1, 9),
        noise(9, 1),
        noise(1, 1),
        matrix_with(torch.tensor([5.0]), 10, 12),
        matrix_with(torch.tensor([5.0]), 100, 120),
    ):
        smoothed = smooth(name, weight)
        assert torch.equal(smoothed.weight, weight)
        assert not smoothed.changed.any()
        assert (smoothed.status == SmoothingStatus.RANK_DEFICIENT).all()


@every_function
def test_a_flat_spectrum_keeps_its_bits(name: str) -> None:
    weight = torch.eye(12)[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))] / 2
    smoothed = smooth(name, weight)
    assert torch.equal(smoothed.weight, weight)
    assert smoothed.status == SmoothingStatus.UNCHANGED
    assert smoothed.stable_rank_after == smoothed.stable_rank_before


@every_function
def test_bfloat16_is_rounded_once(name: str) -> None:
    weight = collapsed(20, 30).bfloat16()
    narrow, wide = smooth(name, weight), smooth(name, weight.float())
    assert narrow.weight.dtype == torch.bfloat16
    assert narrow.sigma_after.dtype == torch.float32
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
    error = (narrow.weight.float() - wide.weight).abs()
    assert (error <= BFLOAT16_STEP * wide.weight.abs()).all()


@every_function
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_matrices_are_refused(name: str, bad: float) -> None:
    weight = noise(3, 9, 5)
    weight[1, 4, 2] = bad
    with pytest.raises(NonFiniteError, match="not finite"):
        smooth(name, weight)


@every_function
def test_the_frobenius_norm_can_be_kept(name: str) -> None:
    weight = collapsed(2, 20, 30)
    smoothed = smooth_spectrum(weight, SMOOTHING_FUNCTIONS[name](), keep_frobenius=True)
    before, now = (torch.linalg.matrix_norm(w.double()) for w in (weight, smoothed.weight))
    gain = before / torch.linalg.matrix_norm(smooth(name, weight).weight.double())
    tolerance = EDIT_TOLERANCE * gain  # rescaling enlarges the error of the edit with the rest
    assert ((now - before).abs() <= tolerance * before).all()
    largest = smoothed.sigma_before[..., 0]
    actual = torch.linalg.matrix_norm(smoothed.weight.double(), ord=2)
    assert (actual <= largest * (1 + tolerance)).all()
    assert ((actual - smoothed.sigma_after[..., 0]).abs() <= tolerance * largest).all()


@every_function
def test_deterministic_and_without_touching_the_global_random_state(name: str) -> None:
    weight = collapsed(2, 250, 220)
    before = torch.get_rng_state()
    first, second = smooth(name, weight), smooth(name, weight)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight)


def test_the_battery_can_fail() -> None:
    """A φ that goes below s is caught by the very inequality that the contract asserts."""
    spectrum = Spectrum(torch.tensor([3.0, 2.0, 1.0]), torch.tensor(2), torch.tensor(0.0), (3, 3))
    below = spectrum.sigma * (1 - 2e-6)
    assert not (below >= spectrum.sigma - VALUE_TOLERANCE * spectrum.sigma[0] / 3).all()
