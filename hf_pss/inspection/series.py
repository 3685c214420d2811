"""Several checkpoints of one run, a line each: how ranks and norms move over the steps."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_pss.inspection.survey import Inspection

__all__ = ["SeriesRow", "series"]

_STEP = re.compile(r"(?:^|[-_])(\d{1,12})$")


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """One checkpoint in numbers; each is NaN where no matrix is finite."""

    path: Path
    step: int | None
    """The number that ends the path's name: ``checkpoint-500``."""
    median_stable_rank: float
    lowest_stable_rank: float
    """Of the matrices that are not zero."""
    median_sigma1: float
    largest_sigma1: float
    num_nonfinite: int
    """Matrices and other tensors that hold NaN or inf."""
    num_findings: int


def series(inspections: Sequence[Inspection]) -> tuple[SeriesRow, ...]:
    """Return a row for each checkpoint, in the order given; cost: none worth naming."""
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
