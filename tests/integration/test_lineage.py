"""Which checkpoints are a run's own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers import make_trainer

from hf_pss import PSSConfig
from hf_pss.runs.checkpoint import Lineage, abandon
from hf_pss.runs.folder import ABANDONED


def folders(run_dir: Path, *steps: int) -> list[Path]:
    made = [run_dir / f"checkpoint-{step}" for step in steps]
    for path in made:
        path.mkdir(parents=True)
    return made


def names(lineage: Lineage) -> list[str]:
    return [path.name for path in lineage.folders]


def test_a_resumed_run_owns_its_source_and_older_checkpoints_beside_it(tmp_path: Path) -> None:
    *_, source, _ = folders(tmp_path, 2, 4, 6, 8)
    (tmp_path / "checkpoint-4" / "pss_superseded").touch()  # of an earlier run in this folder
    lineage = Lineage.of(source)
    assert names(lineage) == ["checkpoint-2", "checkpoint-6"]
    assert lineage.source == source
    (saved,) = folders(tmp_path / "rescued", 9)
    lineage = lineage.with_saved(saved)
    assert lineage.name_before(9) == "checkpoint-6"
    assert lineage.name_before(2) is None
    assert names(lineage.up_to(8)) == ["checkpoint-2", "checkpoint-6"]


def test_a_source_of_any_name_stands_alone(tmp_path: Path) -> None:
    folders(tmp_path, 2, 4)
    assert Lineage.of(tmp_path / "repaired").folders == (tmp_path / "repaired",)
    assert Lineage.of(None).folders == ()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, PSSConfig.preset("paper"), max_steps=3, save_steps=1).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK")
    lineage = Lineage.of(tmp_path / "checkpoint-3")
    found = lineage.newest_before(3)
    assert found is not None
    assert found.step == 1
    assert "checkpoint-2: optimizer.pt has 2 bytes" in caplog.text
    assert lineage.newest_before(1) is None


def test_only_checkpoints_in_the_runs_folder_are_abandoned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run_dir = tmp_path / "run"
    own, other = folders(run_dir, 4)[0], folders(tmp_path, 5)[0]
    assert abandon(run_dir, [own, other, run_dir / "checkpoint-6"])
    assert (run_dir / ABANDONED / "checkpoint-4").is_dir()
    assert other.is_dir()
    assert len(caplog.records) == 1
    assert not abandon(run_dir, [other])
    assert (run_dir / ABANDONED / "checkpoint-4").is_dir()
