"""Low-rank edits of weight matrices: computed by one rank, sent to all, made on what each keeps.

Carry an intervention out, in place: smooth the spectra of the model's selected matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.linalg import Smoothed, SmoothingFunction, SmoothingStatus, smooth_spectrum
from hf_pss.models.batching import (
    Slot,
    Stack,
    Turn,
    expert_rows,
    matrix_names,
    raise_together,
    read_turn,
    share_out,
    write_stack_,
)
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.selection import MatrixView
from hf_pss.records.events import MatrixChange

__all__ = [
    "FAILED",
    "NON_FINITE",
    "RAISED",
    "STATUS_NAMES",
    "Edit",
    "Outcome",
    "apply_edits_",
    "exchange",
    "smooth_matrices_",
]

# What happened to a matrix, as it is sent; SmoothingStatus has the numbers below.
NON_FINITE, FAILED, RAISED = 8, 9, 10
"""No decomposition; one that did not converge; an error that no rank goes on after."""
STATUS_NAMES = {
    **{int(status): status.name.lower() for status in SmoothingStatus},
    NON_FINITE: "non_finite",
    FAILED: "failed",
}
_NUM_NUMBERS = 8


@dataclass(frozen=True, slots=True)
class Edit:
    """W ← g · (W + Σ (σ*_i − σ_i) u_i v_iᵀ), over the singular values that move."""

    slot: Slot
    u: Tensor
    """(m, k), k the number of values that move."""
    before: Tensor
    """(k,), σ."""
    after: Tensor
    """(k,), σ*, before the gain."""
    v: Tensor
    """(n, k)."""
    gain: float

    def apply_(self, part: Part) -> None:
        """Make the edit on the rows of the stored parameter that are kept here."""
        piece = self.slot.view.piece(part.tensor, part.start, self.slot.expert)
        if piece is None:
            return
        left, right = self.u[piece.rows], self.v[piece.columns]
        matrix = piece.read().to(self.u.dtype)
        piece.write_((matrix + (left * (self.after - self.before)) @ right.mT) * self.gain)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some matrices, on the rank that decomposed them or on one that was told."""

    slots: tuple[Slot, ...]
    numbers: Tensor
    """(len(slots), 8), float64: status, number of moved values, k, σ₁ and stable rank before and
    after, gain."""
    made: tuple[tuple[Stack, Smoothed], ...] = ()
    """What was decomposed here."""
    received: tuple[Edit, ...] = ()
    """What another rank, or this one for all, has sent."""
    error: Exception | None = None
    """What was raised here: to be raised again once all ranks have been told."""

    @classmethod
    def of(cls, stack: Stack, smoothed: Smoothed) -> Outcome:
        """Take what `smooth_spectrum` found for a stack."""
        moved = smoothed.sigma_before != smoothed.sigma_target
        index = torch.arange(1, moved.shape[-1] + 1, device=moved.device)
        counts = (moved * index).amax(dim=-1) * smoothed.changed
        columns = (
            smoothed.status,
            counts,
            smoothed.rank,
            smoothed.sigma_before[:, 0],
            smoothed.spectral_norm_after,
            smoothed.stable_rank_before,
            smoothed.stable_rank_after,
            smoothed.gain,
        )
        numbers = torch.stack([column.double() for column in columns], dim=-1)
        return cls(stack.slots, numbers, made=((stack, smoothed),))

    @classmethod
    def without_change(
        cls, slots: tuple[Slot, ...], status: int, error: Exception | None = None
    ) -> Outcome:
        """Return that of matrices that were not decomposed, for one of the reasons above."""
        numbers = torch.full((len(slots), _NUM_NUMBERS), torch.nan, dtype=torch.float64)
        numbers[:, 0], numbers[:, 1] = status, 0
        return cls(slots, numbers, error=error)

    @classmethod
    def joined(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Return several as one."""
        return cls(
            tuple(slot for outcome in outcomes for slot in outcome.slots),
            torch.cat([o.numbers.to(outcomes[-1].numbers.device) for o in outcomes]),
            tuple(pair for outcome in outcomes for pair in outcome.made),
        )

    def edits(self) -> tuple[Edit, ...]:
        """Return the edits of those that changed."""
        return self.received or tuple(
            Edit(
                slot,
                smoothed.u[i, :, :k],
                smoothed.sigma_before[i, :k],
                smoothed.sigma_target[i, :k],
                smoothed.v[i, :, :k],
                gain,
            )
            for (stack, smoothed), rows in zip(self.made, self._rows_of_made(), strict=True)
            for i, (slot, row) in enumerate(zip(stack.slots, rows, strict=True))
            for k, gain in [(int(row[1]), row[-1])]
            if k
        )

    @property
    def is_broken(self) -> bool:
        """Whether an error ended the work on these matrices; reads back from the device."""
        return bool((self.numbers[:, 0] == RAISED).any())

    def _rows_of_made(self) -> Iterator[list[list[float]]]:
        rows = dict(zip(self.slots, self.numbers.tolist(), strict=True))
        for stack, _ in self.made:
            yield [rows[slot] for slot in stack.slots]

    def changes(self) -> Iterator[MatrixChange]:
        """Yield the record of each matrix."""
        for slot, row in zip(self.slots, self.numbers.tolist(), strict=True):
            status = STATUS_NAMES[int(row[0])]
            if int(row[0]) in (NON_FINITE, FAILED):
                yield MatrixChange(slot.name, slot.shape, status)
            else:
                yield MatrixChange(slot.name, slot.shape, status, int(row[2]), *row[3:7])


def exchange(
    turn: Turn,
    mine: Outcome | None,
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> list[Outcome]:
    """Return every rank's outcome of a turn, on all ranks; two broadcasts each.

    What travels of a matrix are eight numbers and, where it changes, U, σ, σ* and V of the values
    that move: (m + n + 2) · k floats, against m · n of the matrix.

    Args:
        turn: Which matrices each rank worked on.
        mine: This rank's outcome, its slots in any order; None where it had nothing to do.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    outcomes = []
    for owner, slots in enumerate(turn):
        if slots:
            own = mine if owner == backend.rank else None
            outcomes.append(_sent(own, owner, slots, parameters, backend))
    return outcomes


def _sent(
    own: Outcome | None,
    owner: int,
    slots: tuple[Slot, ...],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> Outcome:
    parameter = parameters[slots[0].view.parameter_name]
    numbers = torch.zeros(len(slots), _NUM_NUMBERS, dtype=torch.float64, device=parameter.device)
    if own is not None:
        position = {slot.name: i for i, slot in enumerate(own.slots)}
        numbers.copy_(own.numbers[[position[slot.name] for slot in slots]])
    backend.send_(numbers, owner)
    rows = zip(slots, numbers.tolist(), strict=True)
    sizes = [(slot, int(row[1]), row[-1]) for slot, row in rows if row[1]]
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    length = sum((sum(slot.shape) + 2) * k for slot, k, _ in sizes)
    payload = torch.empty(length, dtype=dtype, device=parameter.device)
    if own is not None and length:
        by_name = {edit.slot.name: edit for edit in own.edits()}
        edits = [by_name[slot.name] for slot, _, _ in sizes]
        torch.cat(
            [t.reshape(-1) for e in edits for t in (e.u, e.before, e.after, e.v)], out=payload
        )
    if length:
        backend.send_(payload, owner)
    received, at = [], 0
    for slot, k, gain in sizes:
        m, n = slot.shape
        u, before, after, v = torch.split(payload[at : at + (m + n + 2) * k], [m * k, k, k, n * k])
        received.append(Edit(slot, u.view(m, k), before, after, v.view(n, k), gain))
        at += (m + n + 2) * k
    return Outcome(slots, numbers, received=tuple(received))


def apply_edits_(edits: Iterable[Edit], parameters: Mapping[str, Tensor], backend: Backend) -> None:
    """Make the edits on every rank's part of the parameters; each parameter is opened once."""
    for name, group in itertools.groupby(edits, key=lambda edit: edit.slot.view.parameter_name):
        own = tuple(group)
        rows = expert_rows(edit.slot for edit in own)
        with backend.part(parameters[name], rows) as part:
            for edit in own:
                edit.apply_(part)


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
