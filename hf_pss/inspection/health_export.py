"""An inspection as strict JSON. NaN and inf become null, and the findings name them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from hf_pss.inspection.compare import ChangedMatrix
from hf_pss.inspection.matrix_survey import Inspection, JudgedMatrix, SeriesRow
from hf_pss.records.strict_json import finite_or_none

__all__ = ["SCHEMA_VERSION", "as_json", "write_json"]

SCHEMA_VERSION = 1


def as_json(
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[ChangedMatrix] = (),
    rows: Sequence[SeriesRow] = (),
) -> dict[str, Any]:
    """Return plain data with the worst matrices first. Only spectra stay arrays.

    Args:
        inspection: The first checkpoint.
        other: The checkpoint to compare it with.
        changes: Changes from `inspection` to `other`.
        rows: Rows of a series that `inspection` begins and `other` ends.
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
        data["series"] = [_fields(row, *(field.name for field in fields(row))) for row in rows]
    return data


def write_json(
    stream: TextIO,
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[ChangedMatrix] = (),
    rows: Sequence[SeriesRow] = (),
) -> None:
    """Write the result of `as_json` and a newline, with only one spectrum at a time as a list."""
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
        **_fields(health, "sigma1", "frobenius", "stable_rank"),
        "noise_stable_rank": health.noise,
        "num_nonfinite": health.num_nonfinite,
        "findings": [_fields(found, "kind", "text") for found in judged.findings],
    }
    if health.source.note:
        row["note"] = health.source.note
    if health.spectrum is not None:
        row |= _fields(health, "effective_rank")
        row["singular_values"] = health.spectrum
    return row


def _change(change: ChangedMatrix) -> dict[str, Any]:
    sides = {"before": change.before, "after": change.after}
    brief = ("sigma1", "stable_rank", "num_nonfinite")
    return {
        "name": change.name,
        **{side: None if one is None else _fields(one, *brief) for side, one in sides.items()},
        **_fields(change, "sigma1_ratio", "stable_rank_ratio", "relative_change"),
    }


def _fields(record: object, *names: str) -> dict[str, Any]:
    return {name: _plain(getattr(record, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_none(value)
    return str(value) if isinstance(value, Path) else value


def _numbers(values: array[float]) -> list[float | None]:
    return [_plain(value) for value in values]
