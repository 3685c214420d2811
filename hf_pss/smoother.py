"""Carry an intervention out, in place: smooth the spectra of the model's selected matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
from hf_pss.linalg import (
    SmoothingFunction,
    StableRankCap,
    Triplets,
    quick_triplets,
    smooth_spectrum,
)
from hf_pss.selection import MatrixView
from hf_pss.stacks import (
    Slot,
    Stack,
    Tally,
    Turn,
    matrix_names,
    raise_together,
    read_turn,
    share_out,
    write_stack_,
)

__all__ = ["Look", "cap_matrices_", "look_at_matrices", "smooth_matrices_"]


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
        and_then: Told, on every rank, of the edits that were made.

    Returns:
        What happened to each matrix looked at, in the model's order.
    """
    outcomes: list[Outcome] = []
    for turn in share_out(views, parameters, backend.world_size, names=names):
        stack = read_turn(turn, parameters, backend)
        mine = None
        if stack is not None:
            try:
                mine = _smoothed(stack, phi_for, max_rank=max_rank, keep_frobenius=keep_frobenius)
            except Exception as error:
                mine = Outcome.without_change(stack.slots, RAISED, error)
        outcomes += _carried_out(turn, mine, parameters, backend, and_then)
    return _on_record(views, outcomes)


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
    and_then: Callable[[Sequence[Edit]], None] | None,
) -> list[Outcome]:
    """Make the edits of all ranks, on all ranks.

    Raises:
        ElsewhereError: Another rank's work has ended in an error, which that rank raises itself.
    """
    if not backend.is_shared and mine is not None and mine.error is not None:
        raise mine.error
    if not backend.is_shared:
        outcomes = [mine] if mine is not None else []
        for stack, smoothed in (pair for outcome in outcomes for pair in outcome.made):
            changed = smoothed.changed.tolist()
            write_stack_(stack, smoothed.weight, changed, parameters, backend)
    else:
        # Replicas stay equal bit for bit because every rank makes the edit in the same way, the
        # one that found it too.
        outcomes = exchange(turn, mine, parameters, backend)
        if any(outcome.is_broken for outcome in outcomes):
            raise_together(mine.error if mine is not None else None)
        for outcome in outcomes:
            apply_edits_(outcome.edits(), parameters, backend)
    if and_then is not None:
        for outcome in outcomes:
            and_then(outcome.edits())
    return outcomes


def _on_record(
    views: Sequence[MatrixView], outcomes: Sequence[Outcome]
) -> tuple[MatrixChange, ...]:
    """Return the records in the model's order, which no sharing out of work changes."""
    records = {change.name: change for outcome in outcomes for change in outcome.changes()}
    return tuple(records[name] for name in matrix_names(views) if name in records)


@dataclass(frozen=True, slots=True)
class Look:
    """What one turn saw of the matrices: leading singular triplets, each with its owner."""

    turn: Turn
    triplets: Triplets | None
    """Of this rank's slots, without the matrices: these would be a second copy of the model."""
    tails: Tensor
    """(this rank's slots,), the Frobenius norm of what the triplets leave."""

    def stable_ranks(self) -> Tensor:
        """Return (this rank's slots,); NaN where a matrix holds NaN or inf."""
        if self.triplets is None:
            return self.tails
        values = torch.cat([self.triplets.sigma, self.tails.unsqueeze(-1)], dim=-1)
        ratios = values / torch.where(values[:, :1] == 0, 1.0, values[:, :1])
        return ratios.square().sum(dim=-1)

    def reaches(self, floors: Sequence[float], max_rank: int) -> list[bool]:
        """Tell of each matrix whether capping the triplets at hand can bring it to its floor.

        Capped at the last of K values, a matrix has the stable rank K + tail² / σ_K².
        """
        if self.triplets is None:
            return []
        num_values = self.triplets.sigma.shape[-1]
        last = self.triplets.sigma[:, -1]
        highest = num_values + (self.tails / torch.where(last > 0, last, 1.0)).square()
        return [
            num_values <= max_rank + 1 and rank >= floor
            for rank, floor in zip(highest.tolist(), floors, strict=True)
        ]


@torch.no_grad()
def look_at_matrices(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> tuple[tuple[Look, ...], dict[str, float]]:
    """Look at all matrices with `quick_triplets`; return the looks and the stable ranks by name.

    σ₁ is low, and the stable rank high, by its band. One device-to-host read.

    Args:
        views: What to look at.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    looks, tally = [], Tally(parameters, backend)
    for turn in share_out(views, parameters, backend.world_size):
        stack = read_turn(turn, parameters, backend)
        triplets, tails = None, torch.empty(0)
        if stack is not None:
            with tally.guard():
                triplets, tails = quick_triplets(stack.matrices)
        looks.append(Look(turn, triplets, tails))
        tally.add(turn, looks[-1].stable_ranks() if triplets is not None else None)
    by_name = tally.told()
    return tuple(looks), {name: by_name[name] for name in matrix_names(views) if looks}


@torch.no_grad()
def cap_matrices_(
    looks: Sequence[Look],
    floors: Mapping[str, float],
    names: Collection[str],
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    *,
    max_rank: int,
    keep_frobenius: bool = False,
    and_then: Callable[[Sequence[Edit]], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Bring the named matrices up to their stable-rank floors, with the triplets of a look at them.

    Where a look has too few triplets to reach the floor, the matrix is decomposed thoroughly.

    Args:
        looks: Of the matrices as they are now.
        floors: Of each matrix, by name.
        names: Which matrices; finite ones only.
        views: The selected matrices.
        parameters: The model's parameters by canonical name; those touched change in place.
        backend: How parameters are stored.
        max_rank: At most so many singular values of a matrix move.
        keep_frobenius: Rescale each capped matrix to the Frobenius norm it had.
        and_then: As in `smooth_matrices_`.
    """
    outcomes: list[Outcome] = []
    for look in looks:
        turn = tuple(tuple(s for s in slots if s.name in names) for slots in look.turn)
        if not any(turn):
            continue
        stack = read_turn(turn, parameters, backend)
        mine = None
        if stack is not None:
            try:
                mine = _capped(
                    stack,
                    look,
                    look.turn[backend.rank],
                    floors,
                    max_rank=max_rank,
                    keep_frobenius=keep_frobenius,
                )
            except Exception as error:
                mine = Outcome.without_change(stack.slots, RAISED, error)
        outcomes += _carried_out(turn, mine, parameters, backend, and_then)
    return _on_record(views, outcomes)


def _capped(
    stack: Stack,
    look: Look,
    seen: Sequence[Slot],
    floors: Mapping[str, float],
    *,
    max_rank: int,
    keep_frobenius: bool,
) -> Outcome:
    """Cap the matrices of a stack, which are some of those that were seen."""
    assert look.triplets is not None  # a look that fails raises
    names = frozenset(stack.names)
    kept = [slot.name in names for slot in seen]
    reached = look.reaches([floors[slot.name] for slot in seen], max_rank)
    is_known = [reach for reach, keep in zip(reached, kept, strict=True) if keep]
    outcomes = []
    for known in (True, False):
        part = [k is known for k in is_known]
        if any(part):
            here = stack if all(part) else stack.where(part)
            chosen = [k and r is known for k, r in zip(kept, reached, strict=True)]
            index = [i for i, keep in enumerate(chosen) if keep]
            outcomes.append(
                _decomposed(
                    here,
                    StableRankCap(torch.tensor([floors[name] for name in here.names])),
                    max_rank=max_rank,
                    keep_frobenius=keep_frobenius,
                    known=(look.triplets.where(chosen), look.tails[index]) if known else None,
                )
            )
    return Outcome.joined(outcomes)
