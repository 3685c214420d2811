"""SoftMuon and SoftSignum (Feoktistov et al. 2026, arXiv 2605.31371), for one matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["quantile", "soft_muon", "soft_signum", "temperatures"]

_NEWTON_STEPS = 10


def quantile(p: float, location: float, width: float) -> float:
    """Return the p-quantile of |X|, X Cauchy distributed, by Newton's method.

    It starts at the quantile of an unmoved X, plus the location, as the paper's code does. That
    divides by a width of 0, where |X| is |location|.
    """
    if width == 0:
        return abs(location) if p > 0 else 0.0
    q = width * math.tan(math.pi * p / 2) + abs(location)
    for _ in range(_NEWTON_STEPS):
        right, left = (q - location) / width, (-q - location) / width
        distance = (math.atan(right) - math.atan(left)) / math.pi - p
        slope = (1 / (1 + right**2) + 1 / (1 + left**2)) / (math.pi * width)
        q = max(0.0, q - distance / slope)
    return q


def temperatures(values: Tensor, num_steps: int, *, saturated: float) -> list[float]:
    """Return τ of each step of the soft phase.

    Args:
        values: The softened numbers: singular values, or entries.
        num_steps: T; step j takes the quantile of p = j/T.
        saturated: φ⁻¹(1 − ε): where the soft sign is as good as hard.
    """
    location = float(values.median())
    width = float((values - location).abs().median())
    found = []
    for j in range(num_steps):
        q = quantile(j / num_steps, location, width)
        found.append(min(max(saturated / q, 1.0), 1e9) if q > 0 else 1e9)
    return found


def soft_muon(matrix: Tensor, tau: float, *, scale: float = 1.0) -> Tensor:
    """Return s · U diag(τσ / √(1 + (τσ)²)) Vᵀ."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    soft: Tensor = u @ torch.diag(tau * sigma / (1 + (tau * sigma) ** 2).sqrt()) @ vh
    return scale * soft


def soft_signum(matrix: Tensor, tau: float, *, scale: float = 1.0) -> Tensor:
    """Return s · tanh(τM), entry by entry."""
    return scale * torch.tanh(tau * matrix)
