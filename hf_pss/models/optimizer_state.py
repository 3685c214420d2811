"""The optimizer's first moment of a smoothed matrix: it would grow again what was lowered.

The other sequences of an averaging optimizer: a smoothed matrix is smoothed in all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.models.batching import expert_rows
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.smoother import Edit

__all__ = [
    "FIRST_MOMENTS",
    "ITERATES",
    "edit_first_moments_",
    "edit_iterates_",
    "has_iterates",
    "states_of",
]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Where optimizers keep it: Adam and its family; SGD and Muon."""


@torch.no_grad()
def edit_first_moments_(
    rule: Literal["reset", "project"],
    optimizer: Optimizer,
    edits: Iterable[Edit],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
) -> int:
    """Take from the first moment M of each smoothed matrix what would undo the smoothing. [ours].

    ``project``: M ← M − Σ u_i (u_iᵀ M v_i) v_iᵀ over the singular values that were moved. To first
    order a step along M changes σ_i by u_iᵀ M v_i, so a step of momentum SGD leaves the values
    where smoothing put them; Adam's division by √v̂ makes that approximate. ``reset``: M ← 0.

    A matrix without a first moment (no step yet, or an optimizer that keeps none) is passed over.
    The second moment stays.

    Args:
        rule: See above.
        optimizer: Whose state is edited, in place.
        edits: What was done to the matrices; the same on every rank.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored, and with them their moments.

    Returns:
        How many matrices had a first moment.
    """
    num_edited = 0
    for edit, part in states_of(optimizer, FIRST_MOMENTS, edits, parameters, backend):
        num_edited += 1
        slot = edit.slot
        piece = slot.view.piece(part.tensor, part.start, slot.expert)
        moment = piece.read() if piece is not None else edit.u.new_zeros(0, 0)
        if rule == "reset":
            if piece is not None:
                piece.write_(torch.zeros_like(moment))
            continue
        along = torch.zeros_like(edit.before)  # u_iᵀ M v_i
        if piece is not None:
            wide = moment.to(edit.u.dtype)
            u, v = edit.u[piece.rows], edit.v[piece.columns]
            along = (u * (wide @ v)).sum(dim=0)
        backend.total_(along)
        if piece is not None:
            along = along * (edit.before != edit.after)
            piece.write_(wide - (u * along) @ v.mT)
    return num_edited


def states_of(
    optimizer: Optimizer,
    names: Sequence[str],
    edits: Iterable[Edit],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
) -> Iterator[tuple[Edit, Part]]:
    """Yield each edit with what is kept here of its parameter's state, which may be changed.

    A parameter's state is opened once for all its edits; one without such a state is passed over.
    Collective: every rank goes through to the end.

    Args:
        optimizer: Whose state.
        names: Of the state; the first that there is.
        edits: Those of one parameter beside each other.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored, and with them their states.
    """
    for name, group in itertools.groupby(edits, key=lambda edit: edit.slot.view.parameter_name):
        own = tuple(group)
        rows = expert_rows(edit.slot for edit in own)
        with backend.moment_part(optimizer, parameters[name], names, rows) as part:
            if part is not None:
                for edit in own:
                    yield edit, part


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
