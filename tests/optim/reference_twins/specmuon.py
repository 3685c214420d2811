"""SpecMuon (Lu, Zhang & Lin 2026, arXiv 2602.16167), for one matrix, mode by mode.

The relaxation solves the quadratic of Jiang, Zhang & Zhao 2022 (J. Comput. Phys. 456). Which
reading of the paper this is, and our own choices: see the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from optim.reference_twins.muon import polar
from torch import Tensor

__all__ = ["Mode", "relaxed", "specmuon"]

_OFFSET = 1e-8


@dataclass(frozen=True, slots=True)
class Mode:
    """What one mode remembers."""

    scalar: float
    """r̃, after the last step."""
    dissipation: float
    """h g² r̃² of the last step."""


def relaxed(mode: Mode, energy: float, share: float) -> float:
    """Return ξr̃ + (1 − ξ)E of the least ξ in [0, 1] for which its square is at most r̃² + ψD."""
    # ((r̃ − E)ξ + E)² − r̃² − ψD = aξ² + bξ + c <= 0
    a = (mode.scalar - energy) ** 2
    b = 2 * energy * (mode.scalar - energy)
    c = energy**2 - mode.scalar**2 - share * mode.dissipation
    root = (-b - math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a) if c > 0 and a > 0 else 0.0
    xi = min(1.0, max(0.0, root))
    return xi * mode.scalar + (1 - xi) * energy


def specmuon(
    matrix: Tensor,
    modes: list[Mode],
    *,
    loss: float,
    lr: float,
    num_modes: int = 8,
    relaxation: float = 0.95,
    scale: float = 1.0,
) -> tuple[Tensor, list[Mode]]:
    """Return the direction, and what the modes remember; ``modes`` is empty at first."""
    energy = math.sqrt(max(0.0, loss) + _OFFSET)
    norm = float(matrix.norm())
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    direction = polar(matrix)
    kept = []
    for j in range(min(num_modes, len(sigma))):
        r = relaxed(modes[j], energy, relaxation) if modes else energy
        sigma_j = float(sigma[j]) / norm if norm > 0 else 0.0
        # h = η/σ, g = σ/E.
        h_g2 = lr * sigma_j / energy**2
        r_new = r / (1 + h_g2 / 2)
        kept.append(Mode(r_new, h_g2 * r_new**2))
        if sigma_j > 0:
            direction = direction - (1 - r_new / energy) * torch.outer(u[:, j], vh[j])
    return scale * direction, kept
