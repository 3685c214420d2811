"""The file of a run's health becomes series of one length."""

from __future__ import annotations

import math
from pathlib import Path

from hf_pss.evidence.worker import read_health_series
from hf_pss.records.events import HealthReading
from hf_pss.runs.records_files import health_line, reading_line


def test_every_scalar_is_a_list_with_gaps(tmp_path: Path) -> None:
    file = tmp_path / "pss_health.jsonl"
    readings = (
        HealthReading(5, scalars={"stable_rank/min": 2.0}),
        HealthReading(10, scalars={"stable_rank/min": math.nan, "spectral_edge": 1.234567}),
    )
    lines = [health_line(0, {"a": 3.0}), *map(reading_line, readings)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert read_health_series(file) == {
        "step": [5, 10],
        "spectral_edge": [None, 1.2346],
        "stable_rank/min": [2.0, None],
    }


def test_no_file_and_plain_stable_ranks_are_no_series(tmp_path: Path) -> None:
    file = tmp_path / "pss_health.jsonl"
    assert read_health_series(file) == {}
    file.write_text(health_line(0, {"a": 3.0}) + "\n", encoding="utf-8")
    assert read_health_series(file) == {}
