"""Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon), with the exact polar factor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["momentum_step", "muon", "polar"]


def momentum_step(
    gradient: Tensor, momentum: Tensor, *, mu: float = 0.95, nesterov: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the matrix to orthogonalise, and the new momentum M ← μM + (1 − μ)G.

    By Nesterov μM + (1 − μ)G once more, with the new M; otherwise M.
    """
    momentum = mu * momentum + (1 - mu) * gradient
    return (mu * momentum + (1 - mu) * gradient if nesterov else momentum), momentum


def polar(matrix: Tensor) -> Tensor:
    """Return UVᵀ of the singular values above rounding."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigma[0]
    factor: Tensor = u @ torch.diag((sigma > rounding).to(matrix.dtype)) @ vh
    return factor


def muon(matrix: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return the direction of one matrix (m, n); ``scale`` is s(m, n)."""
    return scale * polar(matrix)
