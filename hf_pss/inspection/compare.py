"""The change of every matrix between two checkpoints of one model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hf_pss.errors import SelectionError
from hf_pss.inspection.matrix_survey import Inspection
from hf_pss.inspection.measure import MatrixHealth
from hf_pss.records.strict_json import visible

__all__ = ["ChangedMatrix", "compare"]

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
        return _ratio(self.before, self.after, "sigma1")

    @property
    def stable_rank_ratio(self) -> float:
        """After / before; NaN if one is missing."""
        return _ratio(self.before, self.after, "stable_rank")

    @property
    def rank(self) -> tuple[int, float, float, str]:
        """Sort key that puts the largest change first.

        Matrices that have become non-finite come first, then changes of σ₁ and rank,
        then the others.
        """
        bad_before = self.before is not None and self.before.num_nonfinite > 0
        bad_after = self.after is not None and self.after.num_nonfinite > 0
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
    changes = [_change(old.get(key), new.get(key)) for key in {**old, **new}]
    return tuple(sorted(changes, key=lambda change: change.rank))


def _by_name(inspection: Inspection, *, bare: bool = False) -> Mapping[str, MatrixHealth]:
    healths: Iterable[MatrixHealth] = (one.health for one in inspection.matrices)
    return {_WRAPPERS.sub("", one.name) if bare else one.name: one for one in healths}


def _change(before: MatrixHealth | None, after: MatrixHealth | None) -> ChangedMatrix:
    named = before or after
    moved = math.nan if before is None or after is None else _moved(before, after)
    return ChangedMatrix(named.name if named else "", before, after, moved)


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


def _ratio(before: MatrixHealth | None, after: MatrixHealth | None, what: str) -> float:
    if before is None or after is None:
        return math.nan
    old, new = float(getattr(before, what)), float(getattr(after, what))
    return new / old if old else math.nan


def _distance(ratio: float) -> float:
    return math.inf if ratio == 0 else abs(math.log(ratio))  # of NaN: NaN
