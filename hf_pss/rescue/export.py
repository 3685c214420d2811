"""An investigation as strict JSON: what is NaN or inf becomes null."""

from __future__ import annotations

import math
from typing import Any

from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.command import ResumePlan
from hf_pss.rescue.investigate import Investigation

__all__ = ["SCHEMA_VERSION", "as_json"]

SCHEMA_VERSION = 1


def as_json(found: Investigation, plan: ResumePlan | None, written: Any = None) -> dict[str, Any]:
    """Return plain data.

    Args:
        found: The investigation.
        plan: How to go on; None where no checkpoint was chosen.
        written: What `--write` did, as plain data.
    """
    choice, history, diagnosis = found.choice, found.history, found.diagnosis
    failure = None if diagnosis is None else diagnosis.failure
    return {
        "version": SCHEMA_VERSION,
        "run": str(found.run_dir),
        "log": None
        if history is None
        else {"path": str(history.path), "step": history.global_step, "rows": len(history.rows)},
        "unreadable": list(found.unreadable),
        "failure": None
        if failure is None
        else {
            "kind": failure.kind,
            "onset_step": failure.onset_step,
            "noticed_step": failure.noticed_step,
            "text": failure.text,
        },
        "notes": [] if diagnosis is None else list(diagnosis.notes),
        "checkpoints": [_checkpoint(one) for one in found.checkpoints],
        "chosen": None if choice.chosen is None else str(choice.chosen.path),
        "reason": choice.reason,
        "is_last_resort": choice.is_last_resort,
        "passed_over": [
            {"path": str(one.path), "reason": reason} for one, reason in choice.passed_over
        ],
        "resume": None
        if plan is None
        else {
            "command": None if plan.command is None else list(plan.command),
            "options": list(plan.options),
            "remarks": list(plan.remarks),
        },
        "written": written,
    }


def _checkpoint(one: CheckpointReport) -> dict[str, Any]:
    inspection = one.inspection
    worst = inspection.matrices[0] if inspection is not None and inspection.matrices else None
    return {
        "path": str(one.path),
        "step": one.step,
        "written": one.written.isoformat(),
        "num_bytes": one.num_bytes,
        "layout": one.layout,
        "verdict": one.verdict,
        "complete": not one.missing,
        "finite": None if inspection is None else inspection.is_finite,
        "missing": list(one.missing),
        "problem": one.problem,
        "remarks": list(one.remarks),
        "num_findings": None if inspection is None else inspection.num_findings,
        "worst_matrix": None
        if worst is None
        else {
            "name": worst.health.name,
            "stable_rank": _finite(worst.health.stable_rank),
            "sigma1": _finite(worst.health.sigma1),
            "findings": [finding.text for finding in worst.findings],
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
