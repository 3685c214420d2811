"""Matrices with known spectra, and the one comparison that the numerics tests make."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

# Shapes that have gone wrong somewhere: vectors, wide, tall, square, batches, and the empty batch.
SHAPES = [(1, 7), (7, 1), (1, 1), (5, 40), (40, 5), (33, 33), (3, 20, 12), (2, 3, 9, 30), (0, 6, 4)]
SCALES = [1e-30, 1e-3, 1.0, 1e30]

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
exponents = st.integers(-30, 30)
seeds = st.integers(0, 10_000)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(sigma: Tensor, m: int, n: int, *, seed: int = 0) -> Tensor:
    """Return a float64 matrix (m, n) with exactly these singular values and random vectors."""
    left = torch.linalg.qr(noise(m, sigma.numel(), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(noise(n, sigma.numel(), seed=seed + 1, dtype=torch.float64)).Q
    matrix: Tensor = (left * sigma.double()) @ right.mT
    return matrix


def polar_factor(weight: Tensor) -> Tensor:
    """Return UVᵀ of a matrix of full rank, float64."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    factor: Tensor = u @ vh
    return factor


def decaying(count: int) -> Tensor:
    """1/i, about what a trained matrix shows."""
    return 1 / torch.arange(1, count + 1, dtype=torch.float64)


def check(error: Tensor | float, tolerance: float) -> None:
    worst = float(torch.as_tensor(error).max()) if torch.as_tensor(error).numel() else 0.0
    assert worst <= tolerance, f"error {worst:.3g} above the tolerance {tolerance:.3g}"


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual − expected| / |expected|, 0 where both are 0."""
    expected = expected.double()
    scale = torch.where(expected == 0, 1.0, expected.abs())
    return (actual.double() - expected).abs() / scale
