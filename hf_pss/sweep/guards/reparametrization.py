"""σReparam: weights that are trained as a gain and a matrix of spectral norm one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hf_pss.selection import select_matrices

__all__ = ["REPARAMETRIZED", "sigma_reparam_"]

REPARAMETRIZED = r"parametrizations\.weight\.original$"
"""Matches the names that the matrices have afterwards."""


class _Gain(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = self.gain * weight
        return scaled


@torch.no_grad()
def sigma_reparam_(model: nn.Module) -> None:
    """Write every selected weight as Ŵ = γ W/σ₁(W), γ learned (arXiv 2303.06296).

    A fused projection is one matrix, with one γ, as in code that fuses. σ₁ is that of torch's
    `spectral_norm`, one round of power iteration a forward pass. γ starts at σ₁, where the paper
    starts it at 1, so that the model starts as the same function as without the guard.
    """
    names = dict.fromkeys(view.parameter_name for view in select_matrices(model).matrices)
    for name in names:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        u, sigma, vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        # Its start takes torch's global generator, on which the data's order would depend.
        with torch.random.fork_rng(devices=[]):
            parametrizations.spectral_norm(module, "weight")
        norm = module.parametrizations.weight[0]
        norm._u.copy_(u[:, 0])
        norm._v.copy_(vh[0])
        parametrize.register_parametrization(module, "weight", _Gain(sigma[0].clone()))
