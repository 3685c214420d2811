"""Spectra (Huang et al. 2026, arXiv 2602.11185), for one matrix, by its whole decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spectra"]


def spectra(matrix: Tensor, *, spike_fraction: float = 0.015, scale: float = 1.0) -> Tensor:
    """Return the momentum with its spikes set to σ_tail, divided by σ_tail **[ours]**.

    k = round(fraction · min(m, n)), at least 1; σ_tail = √((‖M‖² − Σ_{i<=k} σ_i²) / (min − k)).
    Without a tail the spikes are 1 **[ours]**.
    """
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    size = len(sigma)
    k = max(1, round(spike_fraction * size))
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigma[0]
    level = (sigma[k:] ** 2).mean().sqrt() if k < size else torch.zeros_like(sigma[0])
    values = torch.zeros_like(sigma)
    if level > rounding:
        values[:k] = level
        values[k:] = sigma[k:]
        values = values / level
    else:
        values[:k] = (sigma[:k] > rounding).to(sigma.dtype)
    shaped: Tensor = u @ torch.diag(values) @ vh
    return scale * shaped
