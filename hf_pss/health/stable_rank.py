"""Stable rank of every selected matrix: ‖W‖_F² / σ₁² (arXiv 2602.01308)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_pss.distributed import Backend
from hf_pss.linalg import quick_stable_rank
from hf_pss.selection import MatrixView
from hf_pss.stacks import measure_each

__all__ = ["measure_stable_ranks"]


@torch.no_grad()
def measure_stable_ranks(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable rank of each 2-D matrix by name; NaN where a matrix holds NaN or inf.

    Cost: a few products of each matrix with a narrow block, one batched call a shape, and one
    device-to-host read for the whole model.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    return measure_each(views, parameters, backend, quick_stable_rank)
