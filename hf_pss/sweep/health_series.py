"""The live health metrics of one run, as series: from the file that PSS writes to a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_health_series"]


def read_health_series(path: Path) -> dict[str, list[Any]]:
    """Return ``step`` and a list a scalar, all of one length, of a ``pss_health.jsonl``.

    The scalars are a reading's own: those of the whole model, and of each metric the smallest,
    median and largest over matrices (``stable_rank/min``). None stands where a number is not finite
    or was not there. Empty where there is no file, or none with scalars.

    Args:
        path: The file; see `hf_pss.integration.reporting.reading_line`.
    """
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    readings = [line for line in lines if "scalars" in line]
    names = sorted({name for reading in readings for name in reading["scalars"]})
    if not names:
        return {}
    return {
        "step": [reading["step"] for reading in readings],
        **{name: [_short(r["scalars"].get(name)) for r in readings] for name in names},
    }


def _short(value: float | None) -> float | None:
    # Five digits, as a row's losses: far below the scatter between seeds.
    return None if value is None else float(f"{value:.5g}")
