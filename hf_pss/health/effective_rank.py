"""Effective rank of every selected matrix: the exponential of its spectrum's entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_pss.distributed import Backend
from hf_pss.linalg import effective_rank
from hf_pss.selection import MatrixView
from hf_pss.stacks import measure_each

__all__ = ["measure_effective_ranks"]


@torch.no_grad()
def measure_effective_ranks(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return exp(−Σ p_i ln p_i), p_i = σ_i / Σσ, of each 2-D matrix by name.

    Roy & Vetterli 2007, EUSIPCO. In [1, min(m, n)], without unit; 0 for the zero matrix, NaN where
    a matrix holds NaN or inf.

    Cost: full, for sampled steps. Every singular value of every matrix, one batched call a shape,
    and one device-to-host read for the whole model.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    return measure_each(views, parameters, backend, effective_rank)
