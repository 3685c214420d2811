"""Smooth the spectra of a model's matrices in place, by low-rank edits that all ranks make."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.linalg import Smoothed, SmoothingFunction, SmoothingStatus, smooth_spectrum
from hf_pss.models.batching import (
    MatrixRef,
    Round,
    Stack,
    assign_rounds,
    by_parameter,
    expert_rows,
    matrix_names,
    raise_together,
    read_round,
    write_stack_,
)
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.selection import MatrixView
from hf_pss.records.events import MatrixChange

# The status of a matrix, as ranks send it. `SmoothingStatus` has the numbers below 8.
NON_FINITE, FAILED, RAISED = 8, 9, 10
"""The statuses of a matrix that was not decomposed, of a decomposition that did not converge, and
of an error that ends the run."""
STATUS_NAMES = {
    **{int(status): status.name.lower() for status in SmoothingStatus},
    NON_FINITE: "non_finite",
    FAILED: "failed",
}

PhiFor = Callable[[Sequence[str]], SmoothingFunction]
"""Returns the smoothing function for a batch of matrices, given their names in order."""


@dataclass(frozen=True, slots=True)
class Edit:
    """W ← g · (W + Σ (σ*_i − σ_i) u_i v_iᵀ), summed over the singular values that move."""

    ref: MatrixRef
    u: Tensor
    """(m, k), where k is the number of values that move."""
    before: Tensor
    """σ, (k,)."""
    after: Tensor
    """σ* before the gain, (k,)."""
    v: Tensor
    """(n, k)."""
    gain: float

    def apply_(self, part: Part) -> None:
        """Make the edit on this rank's rows of the stored parameter."""
        piece = self.ref.view.piece(part.tensor, part.start, self.ref.expert)
        if piece is None:
            return
        left, right = self.u[piece.rows], self.v[piece.columns]
        matrix = piece.read().to(self.u.dtype)
        piece.write_((matrix + (left * (self.after - self.before)) @ right.mT) * self.gain)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of smoothing some matrices, on the rank that decomposed them or as received."""

    refs: tuple[MatrixRef, ...]
    rows: list[list[float]]
    """The numbers of each matrix: status, number of moved values, k, σ₁ and stable rank before and
    after, and the gain."""
    edits: tuple[Edit, ...] = ()
    """The edits of the matrices that change, in their order."""
    made: tuple[Stack, Smoothed] | None = None
    """The decomposed matrices, on the rank that decomposed them."""
    error: Exception | None = None
    """An error of this rank. It is raised when all ranks have received its status."""

    @classmethod
    def of(cls, stack: Stack, phi_for: PhiFor, *, max_rank: int, keep_frobenius: bool) -> Outcome:
        """Decompose and smooth a stack. If an error occurs, it is stored in the result."""
        try:
            return cls._smoothed(stack, phi_for, max_rank, keep_frobenius)
        except Exception as error:
            return cls(stack.refs, [_unchanged(RAISED) for _ in stack.refs], error=error)

    @classmethod
    def _smoothed(
        cls, stack: Stack, phi_for: PhiFor, max_rank: int, keep_frobenius: bool
    ) -> Outcome:
        is_finite = stack.matrices.isfinite().flatten(1).all(1).tolist()
        finite = stack if all(is_finite) else stack.where(is_finite)

        def with_broken(found: Iterable[list[float]]) -> list[list[float]]:
            remaining = iter(found)
            return [next(remaining) if ok else _unchanged(NON_FINITE) for ok in is_finite]

        if not finite.refs:
            return cls(stack.refs, with_broken([]))
        phi = phi_for(finite.names)
        try:
            smoothed = smooth_spectrum(
                finite.matrices,
                phi,
                max_rank=max_rank,
                keep_frobenius=keep_frobenius,
                check_finite=False,
            )
        except LinAlgError:
            return cls(stack.refs, with_broken(_unchanged(FAILED) for _ in finite.refs))
        found = _numbers(smoothed).tolist()
        edits = tuple(
            Edit(
                ref,
                smoothed.u[i, :, :k],
                smoothed.sigma_before[i, :k],
                smoothed.sigma_target[i, :k],
                smoothed.v[i, :, :k],
                gain,
            )
            for i, (ref, (_, count, *_, gain)) in enumerate(zip(finite.refs, found, strict=True))
            if (k := int(count))
        )
        return cls(stack.refs, with_broken(found), edits, made=(finite, smoothed))

    def changes(self) -> list[MatrixChange]:
        """Return the record of each matrix."""
        return [
            matrix_change(ref.name, ref.shape, status, k, *numbers)
            for ref, (status, _, k, *numbers, _) in zip(self.refs, self.rows, strict=True)
        ]


def matrix_change(
    name: str, shape: tuple[int, int], status: float, rank: float, *numbers: float
) -> MatrixChange:
    """Return the record of one matrix: σ₁ and stable rank before and after, if decomposed."""
    word = STATUS_NAMES[int(status)]
    if status in (NON_FINITE, FAILED):
        return MatrixChange(name, shape, word)
    return MatrixChange(name, shape, word, int(rank), *numbers)


def _unchanged(status: int) -> list[float]:
    """Return the row of a matrix that was not decomposed."""
    return [status, 0.0, *[math.nan] * 6]


def _numbers(smoothed: Smoothed) -> Tensor:
    """Return the rows of an `Outcome`, (b, 8), float64."""
    moved = smoothed.sigma_before != smoothed.sigma_target
    index = torch.arange(1, moved.shape[-1] + 1, device=moved.device)
    columns = (
        smoothed.status,
        (moved * index).amax(dim=-1) * smoothed.changed,
        smoothed.rank,
        smoothed.sigma_before[:, 0],
        smoothed.spectral_norm_after,
        smoothed.stable_rank_before,
        smoothed.stable_rank_after,
        smoothed.gain,
    )
    return torch.stack([column.double() for column in columns], dim=-1)


def exchange(
    one_round: Round, own: Outcome | None, parameters: Mapping[str, Tensor], backend: Backend
) -> list[Outcome]:
    """Return every rank's outcome of a round, on all ranks. Each outcome needs two broadcasts.

    Eight numbers are sent for each matrix. If the matrix changes, U, σ, σ* and V of the values that
    move are also sent. These are (m + n + 2) · k floats, and the matrix has m · n.

    Args:
        one_round: The matrices that each rank worked on.
        own: The outcome of this rank, or None if it had no matrix.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    return [
        _sent(own if owner == backend.rank else None, owner, refs, parameters, backend)
        for owner, refs in enumerate(one_round)
        if refs
    ]


def _sent(
    own: Outcome | None,
    owner: int,
    refs: tuple[MatrixRef, ...],
    parameters: Mapping[str, Tensor],
    backend: Backend,
) -> Outcome:
    parameter = parameters[refs[0].view.parameter_name]
    given = [[0.0] * len(_unchanged(0))] * len(refs) if own is None else own.rows
    numbers = torch.tensor(given, dtype=torch.float64, device=parameter.device)
    backend.send_(numbers, owner)
    rows = numbers.tolist()
    moved = [(ref, int(row[1]), row[-1]) for ref, row in zip(refs, rows, strict=True) if row[1]]
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    length = sum((sum(ref.shape) + 2) * k for ref, k, _ in moved)
    payload = torch.empty(length, dtype=dtype, device=parameter.device)
    if length:
        if own is not None:
            pieces = [(e.u, e.before, e.after, e.v) for e in own.edits]
            torch.cat([t.reshape(-1) for piece in pieces for t in piece], out=payload)
        backend.send_(payload, owner)
    edits, at = [], 0
    for ref, k, gain in moved:
        m, n = ref.shape
        u, before, after, v = torch.split(payload[at : at + (m + n + 2) * k], [m * k, k, k, n * k])
        edits.append(Edit(ref, u.view(m, k), before, after, v.view(n, k), gain))
        at += (m + n + 2) * k
    return Outcome(refs, rows, tuple(edits))


def apply_edits_(edits: Iterable[Edit], parameters: Mapping[str, Tensor], backend: Backend) -> None:
    """Make the edits on every rank's part of the parameters. Each parameter is opened once."""
    by_ref = {edit.ref: edit for edit in edits}
    for name, group in by_parameter(by_ref):
        with backend.part(parameters[name], expert_rows(group)) as part:
            for ref in group:
                by_ref[ref].apply_(part)


@torch.no_grad()
def smooth_matrices_(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    phi_for: PhiFor,
    *,
    names: Collection[str] | None = None,
    max_rank: int,
    keep_frobenius: bool = False,
    before_write: Callable[[Collection[str]], None] | None = None,
    and_then: Callable[[Sequence[Edit]], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Smooth the dominant singular values of matrices in place: W ← W + U_k (φ(Σ_k) − Σ_k) V_kᵀ.

    The ranks share the work, and matrices of equal shape share one batched call. If a matrix holds
    NaN or inf, or its decomposition fails, it is reported and not written.

    Args:
        views: The selected matrices.
        parameters: The model's parameters by canonical name. Those of changed
            matrices change in place.
        backend: How parameters are stored.
        phi_for: Returns the smoothing function for a batch of matrices, given their names in order.
            Its level may differ from matrix to matrix.
        names: The 2-D matrices to smooth. None means all.
        max_rank: The largest number of singular values of a matrix that may move.
        keep_frobenius: Rescale each smoothed matrix to its previous Frobenius norm.
        before_write: A function that every rank calls with the names of the
            parameters to be written next.
        and_then: A function that every rank calls with the edits that were made.

    Returns:
        The change of each matrix, in the model's order.

    Raises:
        ElsewhereError: An error ended the work of a different rank, which raises it.
    """
    changes: dict[str, MatrixChange] = {}
    for one_round in assign_rounds(views, parameters, backend.world_size, names=names):
        stack = read_round(one_round, parameters, backend)
        own = (
            None
            if stack is None
            else Outcome.of(stack, phi_for, max_rank=max_rank, keep_frobenius=keep_frobenius)
        )
        outcomes = _agreed(one_round, own, parameters, backend)
        written = {e.ref.view.parameter_name for outcome in outcomes for e in outcome.edits}
        if before_write is not None and written:
            before_write(written)
        for outcome in outcomes:
            if backend.is_shared:
                # Every rank applies the received edit, including the rank that computed it.
                # Replicas stay equal bit for bit because all of them perform the same operations.
                apply_edits_(outcome.edits, parameters, backend)
            elif outcome.made is not None:
                decomposed, smoothed = outcome.made
                changed = smoothed.changed.tolist()
                write_stack_(decomposed, smoothed.weight, changed, parameters, backend)
            changes |= {change.name: change for change in outcome.changes()}
            if and_then is not None:
                and_then(outcome.edits)
    # The changes are in the model's order, which does not depend on the number of ranks.
    return tuple(changes[name] for name in matrix_names(views) if name in changes)


def _agreed(
    one_round: Round, own: Outcome | None, parameters: Mapping[str, Tensor], backend: Backend
) -> list[Outcome]:
    """Return the outcomes of all ranks, or raise on all of them."""
    if not backend.is_shared:
        if own is not None and own.error is not None:
            raise own.error
        return [] if own is None else [own]
    outcomes = exchange(one_round, own, parameters, backend)
    if any(row[0] == RAISED for outcome in outcomes for row in outcome.rows):
        raise_together(None if own is None else own.error)
    return outcomes
