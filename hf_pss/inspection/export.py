"""An inspection as strict JSON: NaN and inf become null, and the findings say which it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_pss.inspection.compare import MatrixChange
from hf_pss.inspection.judge import JudgedMatrix
from hf_pss.inspection.measure import MatrixHealth
from hf_pss.inspection.survey import Inspection

__all__ = ["SCHEMA_VERSION", "as_json"]

SCHEMA_VERSION = 1


def as_json(
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[MatrixChange] = (),
) -> dict[str, Any]:
    """Return plain data: the worst matrices first, as everywhere.

    Args:
        inspection: The checkpoint that was asked for.
        other: The one it was compared with.
        changes: From `inspection` to `other`.
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
    return data


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
        row["effective_rank"] = health.effective_rank
        row["singular_values"] = [_number(sigma) for sigma in health.spectrum]
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


def _brief(health: MatrixHealth | None) -> dict[str, Any] | None:
    if health is None:
        return None
    return {
        "sigma1": _number(health.sigma1),
        "stable_rank": _number(health.stable_rank),
        "num_nonfinite": health.num_nonfinite,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
