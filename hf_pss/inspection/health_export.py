"""An inspection as strict JSON: NaN and inf become null, and the findings say which it was."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from typing import Any, TextIO

from hf_pss.inspection.compare import MatrixChange
from hf_pss.inspection.matrix_survey import Inspection, JudgedMatrix, SeriesRow
from hf_pss.inspection.measure import MatrixHealth

__all__ = ["SCHEMA_VERSION", "as_json", "write_json"]

SCHEMA_VERSION = 1


def as_json(
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[MatrixChange] = (),
    rows: Sequence[SeriesRow] = (),
) -> dict[str, Any]:
    """Return plain data, but for spectra, which stay arrays; the worst matrices first.

    Args:
        inspection: The checkpoint that was asked for.
        other: The one it was compared with.
        changes: From `inspection` to `other`.
        rows: Of a series that `inspection` begins and `other` ends.
    """
    data: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "path": str(inspection.checkpoint.path),
        "model_type": inspection.checkpoint.model_type,
        "method": "exact" if inspection.exact else "quick",
        "finite": inspection.is_finite,
        "num_tensors": len(inspection.checkpoint.tensors),
        "num_bytes": inspection.checkpoint.num_bytes,
        "num_findings": inspection.num_findings,
        "matrices": [_matrix(one) for one in inspection.matrices],
        "non_finite_tensors": [
            {"name": entry.name, "num_nonfinite": num_bad}
            for entry, num_bad in inspection.bad_others
        ],
        "unread_tensors": [
            {"name": entry.name, "reason": reason} for entry, reason in inspection.unread
        ],
    }
    if other is not None:
        data["compared_with"] = str(other.checkpoint.path)
        data["compared_finite"] = other.is_finite
        data["changes"] = [_change(change) for change in changes]
    if rows:
        data["series"] = [_series_row(row) for row in rows]
    return data


def write_json(
    stream: TextIO,
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[MatrixChange] = (),
    rows: Sequence[SeriesRow] = (),
) -> None:
    """Write what `as_json` returns, and a line's end; one spectrum at a time becomes a list."""
    data = as_json(inspection, other=other, changes=changes, rows=rows)
    json.dump(data, stream, allow_nan=False, default=_numbers)
    stream.write("\n")


def _matrix(judged: JudgedMatrix) -> dict[str, Any]:
    health = judged.health
    row: dict[str, Any] = {
        "name": health.name,
        "kind": health.place.kind,
        "block": health.place.block,
        "shape": list(health.shape),
        "dtype": health.source.entry.dtype,
        "sigma1": _number(health.sigma1),
        "frobenius": _number(health.frobenius),
        "stable_rank": _number(health.stable_rank),
        "noise_stable_rank": health.noise,
        "num_nonfinite": health.num_nonfinite,
        "findings": [{"kind": found.kind, "text": found.text} for found in judged.findings],
    }
    if health.source.note:
        row["note"] = health.source.note
    if health.spectrum is not None:
        row["effective_rank"] = _number(health.effective_rank)
        row["singular_values"] = health.spectrum
    return row


def _change(change: MatrixChange) -> dict[str, Any]:
    return {
        "name": change.name,
        "before": _brief(change.before),
        "after": _brief(change.after),
        "sigma1_ratio": _number(change.sigma1_ratio),
        "stable_rank_ratio": _number(change.stable_rank_ratio),
        "relative_change": _number(change.relative_change),
    }


def _series_row(row: SeriesRow) -> dict[str, Any]:
    return {
        "path": str(row.path),
        "step": row.step,
        "median_stable_rank": _number(row.median_stable_rank),
        "lowest_stable_rank": _number(row.lowest_stable_rank),
        "median_sigma1": _number(row.median_sigma1),
        "largest_sigma1": _number(row.largest_sigma1),
        "num_nonfinite": row.num_nonfinite,
        "num_findings": row.num_findings,
    }


def _brief(health: MatrixHealth | None) -> dict[str, Any] | None:
    if health is None:
        return None
    return {
        "sigma1": _number(health.sigma1),
        "stable_rank": _number(health.stable_rank),
        "num_nonfinite": health.num_nonfinite,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _numbers(values: array[float]) -> list[float | None]:
    return [_number(value) for value in values]
