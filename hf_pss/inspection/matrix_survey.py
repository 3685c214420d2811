"""The health of a checkpoint: measure and judge every matrix, and search the other tensors.

For a series of checkpoints of one run, this module gives one row of medians and extremes per
checkpoint. For two checkpoints of one model it gives the change of every matrix.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_pss.errors import SelectionError
from hf_pss.health.verdicts import (
    Finding,
    against_noise,
    against_siblings,
    damaged,
    is_ill,
    siblings_of,
    urgency,
    usual_of_kinds,
    worst_first,
)
from hf_pss.inspection.matrices import find_matrices
from hf_pss.inspection.measure import MatrixHealth, measure
from hf_pss.records.strict_json import visible
from hf_pss.runs.safetensors_files import Checkpoint, TensorEntry, count_nonfinite

Progress = Callable[[int, str], None]
"""Receives the number of bytes just read and the name of the tensor, safe for a terminal."""


@dataclass(frozen=True, slots=True)
class JudgedMatrix:
    """A matrix and its findings."""

    health: MatrixHealth
    findings: tuple[Finding, ...]
    """The findings and then the remarks, each with the worst first."""


def judge(matrices: Iterable[MatrixHealth]) -> tuple[JudgedMatrix, ...]:
    """Return all matrices with their findings, with the worst first.

    Siblings are the matrices of one kind and shape in the other blocks.
    """
    families: defaultdict[tuple[str, str, tuple[int, int]], list[MatrixHealth]] = defaultdict(list)
    for health in matrices:
        families[health.place.stack, health.place.kind, health.shape].append(health)
    usual_sigma1 = usual_of_kinds(
        [one.sigma1 for one in family if one.place.block is not None]
        for family in families.values()
    )
    judged = []
    for family in families.values():
        # This is done once per family, because a stack of experts has tens of thousands of members.
        siblings = siblings_of([one.stable_rank for one in family], [one.sigma1 for one in family])
        for health in family:
            in_block = health.place.block is not None
            found = _damage(health) or [
                *against_noise(health.stable_rank, health.noise),
                *against_siblings(
                    health.stable_rank,
                    health.sigma1,
                    siblings,
                    usual_sigma1=usual_sigma1 if in_block else math.nan,
                ),
            ]
            judged.append(JudgedMatrix(health, worst_first(found)))

    def key(one: JudgedMatrix) -> tuple[int, float, float, str]:
        share = one.health.stable_rank / one.health.noise
        return urgency(one.findings, share, one.health.name)

    return tuple(sorted(judged, key=key))


def _damage(health: MatrixHealth) -> list[Finding]:
    if health.num_nonfinite:
        num_numbers = math.prod(health.shape)
        text = f"{health.num_nonfinite:,} of {num_numbers:,} numbers are NaN or inf"
        return [damaged("non_finite", text)]
    return [damaged("zero")] if health.frobenius == 0 else []


@dataclass(frozen=True, slots=True)
class Inspection:
    """The health of a checkpoint."""

    checkpoint: Checkpoint
    exact: bool
    matrices: tuple[JudgedMatrix, ...]
    """The worst first."""
    bad_others: tuple[tuple[TensorEntry, int], ...]
    """Biases, norms and other tensors with NaN or inf, and how many such entries each has."""
    others: tuple[tuple[TensorEntry, str], ...]
    """Other floating-point tensors, which were searched for NaN and inf, and the
    reason for each."""
    unread: tuple[tuple[TensorEntry, str], ...]
    """Tensors that were not read, and the reason for each."""

    @property
    def is_finite(self) -> bool:
        """Whether all numbers that were read are finite."""
        return not self.bad_others and not any(one.health.num_nonfinite for one in self.matrices)

    @property
    def is_lost(self) -> bool:
        """Whether none of the numbers that were read is finite."""
        found = [one.health for one in self.matrices]
        num_bad = sum(one.num_nonfinite for one in found) + sum(bad for _, bad in self.bad_others)
        num_read = sum(math.prod(one.shape) for one in found)
        num_read += sum(math.prod(entry.shape) for entry, _ in self.others)
        return 0 < num_bad == num_read

    @property
    def num_findings(self) -> int:
        """Number of matrices with a finding that is more than a remark."""
        return sum(is_ill(one.findings) for one in self.matrices)

    @property
    def num_remarks(self) -> int:
        """Number of matrices with remarks only."""
        return sum(bool(one.findings) for one in self.matrices) - self.num_findings


def inspect_checkpoint(
    checkpoint: Checkpoint, *, exact: bool = False, progress: Progress | None = None
) -> Inspection:
    """Measure every matrix and search every other tensor, one tensor at a time.

    Cost: this reads the checkpoint once, and matrices above `WHOLE_BYTES` seven times. Memory: less
    than 1 GiB beyond that of the interpreter, as the tests measure.

    Args:
        checkpoint: The result of `open_checkpoint`.
        exact: Compute all singular values by SVD. This takes minutes instead of seconds.
        progress: Called after each tensor.

    Raises:
        SelectionError: No tensor has a floating dtype.
        StateError: A file has become shorter since its header was read.
    """
    contents = find_matrices(checkpoint)
    if not contents.matrices and not contents.others:
        raise SelectionError(
            f"None of the {len(checkpoint.tensors)} tensors of {visible(checkpoint.path)} has a "
            "floating type that can be read. Give the checkpoint before it was quantised."
        )
    report = progress or (lambda num_bytes, name: None)
    for entry, _ in contents.unread:
        report(entry.num_bytes, visible(entry.name))
    bad = []
    for entry, _ in contents.others:
        if num_bad := count_nonfinite(entry):
            bad.append((entry, num_bad))
        report(entry.num_bytes, visible(entry.name))
    measured: list[MatrixHealth] = []
    for matrix in contents.matrices:
        measured += measure(matrix, exact=exact)
        size = matrix.rows.size / matrix.rows.period if matrix.rows else 1.0
        report(round(matrix.entry.num_bytes * size), visible(matrix.name))
    matrices = judge(measured)
    return Inspection(checkpoint, exact, matrices, tuple(bad), contents.others, contents.unread)


_STEP = re.compile(r"(?:^|[-_])(\d{1,12})$")


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """The numbers of one checkpoint; NaN if no matrix is finite."""

    path: Path
    step: int | None
    """The number at the end of the path's name, as in ``checkpoint-500``."""
    median_stable_rank: float
    lowest_stable_rank: float
    """The lowest value; zero matrices are left out."""
    median_sigma1: float
    largest_sigma1: float
    num_nonfinite: int
    """Number of matrices and other tensors with NaN or inf."""
    num_findings: int


def series(inspections: Sequence[Inspection]) -> tuple[SeriesRow, ...]:
    """Return a row for each checkpoint, in the given order."""
    return tuple(_row(one) for one in inspections)


def _row(inspection: Inspection) -> SeriesRow:
    healths = [one.health for one in inspection.matrices]
    ranks = [one.stable_rank for one in healths if one.stable_rank > 0]  # false for NaN
    tops = [one.sigma1 for one in healths if one.sigma1 >= 0]
    path = inspection.checkpoint.path
    match = _STEP.search(path.name)
    return SeriesRow(
        path=path,
        step=int(match[1]) if match else None,
        median_stable_rank=statistics.median(ranks) if ranks else math.nan,
        lowest_stable_rank=min(ranks, default=math.nan),
        median_sigma1=statistics.median(tops) if tops else math.nan,
        largest_sigma1=max(tops, default=math.nan),
        num_nonfinite=len(inspection.bad_others) + sum(one.num_nonfinite > 0 for one in healths),
        num_findings=inspection.num_findings,
    )


# Changes of σ₁ or rank are ranked by ‖ΔW‖ if their logarithms agree to this many decimals.
_EQUAL_DIGITS = 3
# Prefixes that base models, models with heads and wrappers add to the same name.
_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|base_model|transformer|model)\.)+")


@dataclass(frozen=True, slots=True)
class ChangedMatrix:
    """One matrix in both checkpoints, or in one of them."""

    name: str
    """The name in the first checkpoint that has the matrix."""
    before: MatrixHealth | None
    after: MatrixHealth | None
    relative_change: float
    """‖W_after − W_before‖_F / ‖W_before‖_F. It is NaN if a matrix is missing or not finite, or if
    the two differ in shape or precision (one float64 and one not)."""

    @property
    def sigma1_ratio(self) -> float:
        """After / before; NaN if one is missing."""
        return self._ratio("sigma1")

    @property
    def stable_rank_ratio(self) -> float:
        """After / before; NaN if one is missing."""
        return self._ratio("stable_rank")

    def _ratio(self, what: str) -> float:
        if self.before is None or self.after is None:
            return math.nan
        old, new = float(getattr(self.before, what)), float(getattr(self.after, what))
        return new / old if old else math.nan

    @property
    def rank(self) -> tuple[int, float, float, str]:
        """Sort key that puts the largest change first.

        Matrices that have become non-finite come first, then changes of σ₁ and rank,
        then the others.
        """
        bad_before, bad_after = (
            side is not None and side.num_nonfinite > 0 for side in (self.before, self.after)
        )
        if bad_after and not bad_before:
            return (0, 0.0, 0.0, self.name)
        if self.before is None or self.after is None:
            return (3, 0.0, 0.0, self.name)
        moved = max(_distance(self.sigma1_ratio), _distance(self.stable_rank_ratio))
        if math.isnan(moved):
            return (2, 0.0, 0.0, self.name)
        by_entries = 0.0 if math.isnan(self.relative_change) else self.relative_change
        return (1, -round(moved, _EQUAL_DIGITS), -by_entries, self.name)


@torch.no_grad()
def compare(before: Inspection, after: Inspection) -> tuple[ChangedMatrix, ...]:
    """Return the changes of every matrix, the largest first.

    Names match without the prefixes of wrappers, so ``transformer.h.0…`` finds ``h.0…``. Cost: this
    reads both checkpoints once more, one piece of each at a time.

    Raises:
        SelectionError: They have no matrix in common.
    """
    old, new = _by_name(before), _by_name(after)
    if old.keys().isdisjoint(new):
        old, new = _by_name(before, bare=True), _by_name(after, bare=True)
    if old.keys().isdisjoint(new):
        raise SelectionError(
            f"{visible(before.checkpoint.path)} and {visible(after.checkpoint.path)} have no "
            "name of a matrix in common: give two checkpoints of one model."
        )
    changes = []
    for key, either in {**new, **old}.items():
        one, other = old.get(key), new.get(key)
        moved = _moved(one, other) if one and other else math.nan
        changes.append(ChangedMatrix(either.name, one, other, moved))
    return tuple(sorted(changes, key=lambda change: change.rank))


def _by_name(inspection: Inspection, *, bare: bool = False) -> dict[str, MatrixHealth]:
    healths = [one.health for one in inspection.matrices]
    return {_WRAPPERS.sub("", one.name) if bare else one.name: one for one in healths}


def _moved(before: MatrixHealth, after: MatrixHealth) -> float:
    old, new = before.source.reader, after.source.reader
    alike = (old.stored_shape, old.transposed, old.rows, old.dtype) == (
        *(new.stored_shape, new.transposed, new.rows, new.dtype),
    )
    if not alike or not before.frobenius > 0 or math.isnan(after.frobenius):
        return math.nan
    square = 0.0
    old_pieces, _ = old.tall_pieces(before.expert or 0)
    new_pieces, _ = new.tall_pieces(after.expert or 0)
    for one, other in zip(old_pieces(), new_pieces(), strict=True):
        square += float(((other - one) / before.frobenius).double().square().sum())
    return math.sqrt(square)


def _distance(ratio: float) -> float:
    return math.inf if ratio == 0 else abs(math.log(ratio))  # of NaN: NaN
