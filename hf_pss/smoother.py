"""Carry an intervention out, in place: smooth the spectra of the model's selected matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.distributed import Backend
from hf_pss.edits import (
    FAILED,
    NON_FINITE,
    RAISED,
    Edit,
    Outcome,
    apply_edits_,
    exchange,
)
from hf_pss.events import MatrixChange
from hf_pss.linalg import SmoothingFunction, smooth_spectrum
from hf_pss.selection import MatrixView
from hf_pss.stacks import (
    Stack,
    Turn,
    matrix_names,
    raise_together,
    read_turn,
    share_out,
    write_stack_,
)

__all__ = ["smooth_matrices_"]


@torch.no_grad()
def smooth_matrices_(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    phi_for: Callable[[Sequence[str]], SmoothingFunction],
    *,
    names: Collection[str] | None = None,
    max_rank: int,
    keep_frobenius: bool = False,
    before_write: Callable[[Collection[str]], None] | None = None,
    and_then: Callable[[Sequence[Edit]], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Smooth the dominant singular values of matrices in place: W ← W + U_k (φ(Σ_k) − Σ_k) V_kᵀ.

    The work is shared out over the ranks, and equal shapes go through one batched call. A matrix
    that holds NaN or inf, and one whose decomposition fails, is reported and not written.

    Args:
        views: The selected matrices.
        parameters: The model's parameters by canonical name; those touched change in place.
        backend: How parameters are stored.
        phi_for: The smoothing function for a batch of matrices, given their names in order: a
            function whose level differs from matrix to matrix returns it per name.
        names: Only these 2-D matrices; all when None.
        max_rank: At most so many singular values of a matrix move.
        keep_frobenius: Rescale each smoothed matrix to the Frobenius norm it had.
        before_write: Called on every rank with the names of the parameters that are written next.
        and_then: Called on every rank with the edits that were made.

    Returns:
        What happened to each matrix looked at, in the model's order.
    """
    records: dict[str, MatrixChange] = {}
    for turn in share_out(views, parameters, backend.world_size, names=names):
        stack = read_turn(turn, parameters, backend)
        mine = None
        if stack is not None:
            try:
                mine = _smoothed(stack, phi_for, max_rank=max_rank, keep_frobenius=keep_frobenius)
            except Exception as error:
                mine = Outcome.without_change(stack.slots, RAISED, error)
        for outcome, edits in _carried_out(turn, mine, parameters, backend, before_write):
            records |= {change.name: change for change in outcome.changes()}
            if and_then is not None:
                and_then(edits)
    # In the model's order, which no sharing out of work changes.
    return tuple(records[name] for name in matrix_names(views) if name in records)


def _smoothed(
    stack: Stack,
    phi_for: Callable[[Sequence[str]], SmoothingFunction],
    *,
    max_rank: int,
    keep_frobenius: bool,
) -> Outcome:
    finite = stack.matrices.isfinite().flatten(1).all(1).tolist()
    outcomes = []
    if not all(finite):
        broken = stack.where([not is_finite for is_finite in finite])
        outcomes.append(Outcome.without_change(broken.slots, NON_FINITE))
        stack = stack.where(finite)
    if stack.slots:
        outcomes.append(
            _decomposed(
                stack, phi_for(stack.names), max_rank=max_rank, keep_frobenius=keep_frobenius
            )
        )
    return Outcome.joined(outcomes)


def _decomposed(stack: Stack, phi: SmoothingFunction, **options: Any) -> Outcome:
    """Decompose and smooth; a decomposition that fails leaves its matrices alone, and says so."""
    try:
        smoothed = smooth_spectrum(stack.matrices, phi, check_finite=False, **options)
    except LinAlgError:
        return Outcome.without_change(stack.slots, FAILED)
    return Outcome.of(stack, smoothed)


def _carried_out(
    turn: Turn,
    mine: Outcome | None,
    parameters: Mapping[str, Tensor],
    backend: Backend,
    before_write: Callable[[Collection[str]], None] | None,
) -> list[tuple[Outcome, tuple[Edit, ...]]]:
    """Make the edits of all ranks, on all ranks; return each rank's outcome with its edits.

    Raises:
        ElsewhereError: Another rank's work has ended in an error, which that rank raises itself.
    """
    if not backend.is_shared and mine is not None and mine.error is not None:
        raise mine.error
    outcomes = [mine] if mine is not None else []
    if backend.is_shared:
        outcomes = exchange(turn, mine, parameters, backend)
        if any(outcome.is_broken for outcome in outcomes):
            raise_together(mine.error if mine is not None else None)
    made = [(outcome, outcome.edits()) for outcome in outcomes]
    written = {edit.slot.view.parameter_name for _, edits in made for edit in edits}
    if before_write is not None and written:
        before_write(written)
    for outcome, edits in made:
        if backend.is_shared:
            # Replicas stay equal bit for bit because every rank makes the edit in the same way,
            # the one that found it too.
            apply_edits_(edits, parameters, backend)
            continue
        for stack, smoothed in outcome.made:
            write_stack_(stack, smoothed.weight, smoothed.changed.tolist(), parameters, backend)
    return made
