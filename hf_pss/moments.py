"""The optimizer's first moment of a smoothed matrix: it would grow again what was lowered."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.distributed import Backend, Part
from hf_pss.edits import Edit
from hf_pss.stacks import expert_rows

__all__ = ["FIRST_MOMENTS", "edit_first_moments_", "states_of"]

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
