"""`hf-pss sweep metrics`: whose runs it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner, Result
from watched_rows import family_of_rows

from hf_pss.cli.app import app
from hf_pss.evidence.rows import append_row


def metrics(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["sweep", "metrics", "--output-dir", str(folder), *words])


def test_a_guard_may_be_chosen(tmp_path: Path) -> None:
    for row in family_of_rows():
        for guard in ("watched", "clip"):
            append_row(tmp_path / "rows.jsonl", replace(row, id=f"{guard}-{row.id}", guard=guard))
    assert metrics(tmp_path, "--guard", "clip").exit_code == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["metrics-tiny.png"]
    refused = metrics(tmp_path, "--guard", "pss")
    assert refused.exit_code != 0
    assert "under pss" in " ".join(refused.output.split())
