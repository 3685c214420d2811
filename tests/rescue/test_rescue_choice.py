from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failing_runs import FAILS_AT
from helpers import train

from hf_pss import PSSConfig
from hf_pss.errors import PSSError
from hf_pss.rescue.investigate import Investigation, investigate

RunOf = Callable[..., Path]


@pytest.fixture
def spiked(run_of: RunOf, tmp_path: Path) -> Path:
    """A copy of a run that spiked, to be damaged."""
    return Path(shutil.copytree(run_of("huge_rate"), tmp_path / "run"))


def looked_at(run: Path, margin_steps: int = 5) -> Investigation:
    return investigate(run, margin_steps=margin_steps)


def verdicts(found: Investigation) -> dict[int, str]:
    return {one.step: one.verdict for one in found.checkpoints}


def chosen(found: Investigation) -> int | None:
    return None if found.choice.chosen is None else found.choice.chosen.step


def test_the_newest_sound_one_before_the_failure(spiked: Path) -> None:
    found = looked_at(spiked)
    assert verdicts(found) == {20: "healthy", 40: "healthy", 60: "healthy"} | {
        step: "suspect" for step in (80, 100, 120)
    }
    assert chosen(found) == 60
    assert [one.step for one, _ in found.choice.passed_over] == [120, 100, 80]
    assert not found.choice.is_last_resort


def test_the_margin(spiked: Path) -> None:
    assert chosen(looked_at(spiked, FAILS_AT - 60)) == 40
    found = looked_at(spiked, 1000)  # nothing is that far back
    assert chosen(found) == 60
    assert "less than the margin" in found.choice.reason


def test_checkpoints_that_are_not_finite(run_of: RunOf) -> None:
    found = looked_at(run_of("nan"))
    assert verdicts(found)[80] == "damaged"
    assert chosen(found) == 60
    assert "NaN or inf in" in found.choice.passed_over[0][1]


def test_no_failure_takes_the_newest(run_of: RunOf) -> None:
    assert chosen(looked_at(run_of("sound"))) == 120


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "pipe"])
def test_an_incomplete_checkpoint_is_passed_over(spiked: Path, name: str, how: str) -> None:
    path = spiked / "checkpoint-60" / name
    whole = path.read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes(whole[:-100] if how == "cut" else b"")
    found = looked_at(spiked)
    assert verdicts(found)[60] == "incomplete"
    assert chosen(found) == 40
    assert name in next(why for one, why in found.choice.passed_over if one.step == 60)


def test_damaged_weights_are_passed_over(spiked: Path) -> None:
    path = spiked / "checkpoint-60" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = looked_at(spiked)
    assert verdicts(found)[60] == "damaged"
    assert chosen(found) == 40


def test_the_last_resort_is_the_oldest_after_the_failure(spiked: Path) -> None:
    for step in (20, 40, 60):
        shutil.rmtree(spiked / f"checkpoint-{step}")
    found = looked_at(spiked)
    assert chosen(found) == 80
    assert found.choice.is_last_resort


def test_none_can_be_used(run_of: RunOf, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("nan"), tmp_path / "run"))
    for step in (20, 40, 60):
        shutil.rmtree(run / f"checkpoint-{step}")
    found = looked_at(run)
    assert chosen(found) is None
    assert len(found.choice.passed_over) == 3


def test_the_log_of_an_older_checkpoint_where_the_newest_is_broken(spiked: Path) -> None:
    (spiked / "checkpoint-120" / "trainer_state.json").write_text("{")
    found = looked_at(spiked)
    assert found.history is not None
    assert found.history.global_step == 100
    assert len(found.unreadable) == 1
    assert chosen(found) == 60


def test_a_checkpoint_alone(spiked: Path) -> None:
    found = looked_at(spiked / "checkpoint-60")
    assert chosen(found) == 60
    assert found.history is not None


def test_sharded_layouts_are_listed_and_not_opened(tmp_path: Path, spiked: Path) -> None:
    source = spiked / "checkpoint-60"
    for layout, files in {
        "fsdp_sharded": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"],
        "deepspeed": ["latest", "global_step60/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    }.items():
        folder = tmp_path / layout / "checkpoint-60"
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as stream:
                torch.save({}, stream)
        for name in ("trainer_state.json", "scheduler.pt"):
            shutil.copy(source / name, folder)
        found = looked_at(folder.parent)
        (one,) = found.checkpoints
        assert (one.layout, one.verdict, one.missing) == (layout, "unopened", ())
        assert "not opened" in found.choice.reason
        (folder / files[0]).unlink()
        assert looked_at(folder.parent).checkpoints[0].verdict == "incomplete"


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("[]")
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PSSError):
            looked_at(folder)


def test_a_file_that_is_not_what_the_marker_says(tmp_path: Path) -> None:
    train(tmp_path / "run", PSSConfig(), save_steps=4)
    assert set(verdicts(looked_at(tmp_path / "run")).values()) == {"healthy"}
    path = tmp_path / "run" / "checkpoint-8" / "rng_state.pth"
    path.write_bytes(path.read_bytes() + b"x")
    found = looked_at(tmp_path / "run")
    assert verdicts(found)[8] == "incomplete"
    assert chosen(found) == 4
