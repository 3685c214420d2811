"""The optimizer's first moment of a smoothed matrix: it would grow again what was lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss.distributed import Backend
from hf_pss.linalg import Smoothed
from hf_pss.stacks import Stack, gather, write_stack_

__all__ = ["FIRST_MOMENTS", "edit_first_moments_"]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Where optimizers keep it: Adam and its family; SGD and Muon."""


@torch.no_grad()
def edit_first_moments_(
    rule: Literal["reset", "project"],
    optimizer: Optimizer,
    stack: Stack,
    smoothed: Smoothed,
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
) -> None:
    """Take from the first moment M of each smoothed matrix what would undo the smoothing. [ours].

    ``project``: M ← M − Σ u_i (u_iᵀ M v_i) v_iᵀ over the singular values that were moved. To first
    order a step along M changes σ_i by u_iᵀ M v_i, so a step of momentum SGD leaves the values
    where smoothing put them; Adam's division by √v̂ makes that approximate. ``reset``: M ← 0.

    A matrix without a first moment (no step yet, or an optimizer that keeps none), and one that
    was not changed, is passed over. The second moment stays.

    Args:
        rule: See above.
        optimizer: Whose state is edited, in place.
        stack: The matrices, as they were read.
        smoothed: What was done to them.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored, and with them their moments.
    """
    moments = {
        slot.view.parameter_name: moment
        for slot in stack.slots
        if (moment := _first_moment(optimizer, parameters[slot.view.parameter_name])) is not None
    }
    has_one = [slot.view.parameter_name in moments for slot in stack.slots]
    wanted = smoothed.changed & torch.tensor(has_one, device=smoothed.changed.device)
    keep = wanted.tolist()
    if not any(keep):
        return
    edited = stack.where(keep)
    matrices = gather(edited.slots, moments, backend)
    if rule == "reset":
        matrices = torch.zeros_like(matrices)
    else:
        moved = (smoothed.sigma_before != smoothed.sigma_after)[wanted]
        u, v = smoothed.u[wanted], smoothed.v[wanted]
        wide = matrices.to(u.dtype)
        along = (u * (wide @ v)).sum(dim=-2) * moved  # u_iᵀ M v_i, (stack, K)
        matrices = (wide - (u * along.unsqueeze(-2)) @ v.mT).to(matrices.dtype)
    write_stack_(edited, matrices, [True] * len(edited.slots), moments, backend)


def _first_moment(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | None:
    state = optimizer.state.get(parameter, {})
    found = (state.get(key) for key in FIRST_MOMENTS)
    return next((m for m in found if isinstance(m, Tensor) and m.shape == parameter.shape), None)
