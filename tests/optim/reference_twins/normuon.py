"""NorMuon (Li et al. 2025, arXiv 2510.05491), for one matrix."""

from __future__ import annotations

import torch
from optim.reference_twins.muon import polar
from torch import Tensor

__all__ = ["normuon"]


def normuon(
    matrix: Tensor, second: Tensor, *, beta: float = 0.95, eps: float = 1e-8, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the direction, and the second moment (m,) of the rows, 0 at first.

    O = UVᵀ; v ← β₂v + (1 − β₂) mean_j O_ij²; Ô = O/(√v + ε). **Ours**: Ô takes the norm that O has,
    times s(m, n), where the paper gives it 0.2·√(mn).
    """
    o = polar(matrix)
    rows = []
    for i in range(matrix.shape[0]):
        second_i = beta * second[i] + (1 - beta) * (o[i] ** 2).mean()
        rows.append((o[i] / (second_i.sqrt() + eps), second_i))
    even = torch.stack([row for row, _ in rows])
    norm = even.norm()
    restored = even * (o.norm() / norm) if norm > 0 else even
    return scale * restored, torch.stack([moment for _, moment in rows])
