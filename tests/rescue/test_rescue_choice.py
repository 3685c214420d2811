from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failing_runs import FAILS_AT
from helpers import train
from rich.console import Console
from safetensors.torch import save_file

from hf_pss import PSSConfig
from hf_pss.errors import PSSError
from hf_pss.rescue import candidates
from hf_pss.rescue.candidates import report_on
from hf_pss.rescue.command import plan_resume
from hf_pss.rescue.investigate import Investigation, investigate
from hf_pss.rescue.rescue_report import render_investigation
from hf_pss.runs import records_files
from hf_pss.runs.checkpoint import examine
from hf_pss.runs.folder import MARKER, SUPERSEDED
from hf_pss.runs.follow import Follower

RunOf = Callable[..., Path]


def test_the_heading_and_the_text_agree_on_the_first_bad_step(run_of: Callable[..., Path]) -> None:
    found = investigate(run_of("nan"), margin_steps=5)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_investigation(found))
    shown = capture.get()
    onset = found.failure.onset_step
    assert f"NOT FINITE, from the update of step {onset} on." in shown
    assert f"At step {onset + 1} the loss was " in shown


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


def unmark(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)


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
    # Checkpoints 20 and 40 are older, and not old enough.
    assert "but no usable checkpoint is that much older" in found.choice.reason


def test_checkpoints_that_are_not_finite(run_of: RunOf) -> None:
    found = looked_at(run_of("nan"))
    assert verdicts(found)[80] == "damaged"
    assert chosen(found) == 60
    assert "NaN or inf in" in found.choice.passed_over[0][1]


def test_no_failure_takes_the_newest(run_of: RunOf) -> None:
    assert chosen(looked_at(run_of("sound"))) == 120


def test_checkpoints_of_an_earlier_run_are_passed_over(run_of: RunOf, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("sound"), tmp_path / "run"))
    (run / "checkpoint-120" / SUPERSEDED).touch()
    found = looked_at(run)
    assert chosen(found) == 100
    assert found.choice.passed_over[0][1] == "of an earlier run in this folder"
    assert chosen(looked_at(run / "checkpoint-120")) == 120


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


@pytest.mark.parametrize("is_too_large", [False, True])
def test_one_limit_on_the_size_of_a_state_holds_for_all(
    spiked: Path, monkeypatch: pytest.MonkeyPatch, is_too_large: bool
) -> None:
    """Resume, rescue and watch agree on whether a large trainer_state.json can be read."""
    folder = spiked / "checkpoint-60"
    size = (folder / "trainer_state.json").stat().st_size
    monkeypatch.setattr(records_files, "MAX_STATE_BYTES", size - is_too_large)
    for why in (examine(folder).problem, "; ".join(report_on(folder).missing)):
        assert ("larger than" in (why or "")) == is_too_large
    assert (Follower(folder).poll().log is None) == is_too_large


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
    assert found.log is not None
    assert found.log.global_step == 100
    assert len(found.unreadable) == 1
    assert chosen(found) == 60


def test_the_log_of_the_newest_attempt(spiked: Path) -> None:
    # Resumed in place from step 80, at which it died: the log of the first attempt reaches farther.
    state = json.loads((spiked / "checkpoint-80" / "trainer_state.json").read_text())
    state["log_history"][9]["loss"] += 1.0
    for name in ("checkpoint-80/trainer_state.json", "trainer_state.json"):
        (spiked / name).write_text(json.dumps(state))
    now = time.time()
    for step in (20, 40, 60, 100, 120):
        os.utime(spiked / f"checkpoint-{step}" / "trainer_state.json", (now, now - 1000))
    found = looked_at(spiked)
    assert found.log is not None
    assert found.log.global_step == 80
    assert "differ from step 10 on" in found.notes[0]


def test_of_logs_that_agree_the_longest_is_taken(spiked: Path) -> None:
    os.utime(spiked / "checkpoint-40" / "trainer_state.json")  # copied last
    found = looked_at(spiked)
    assert found.log is not None
    assert found.log.global_step == 120
    assert not any("differ" in note for note in found.notes)


def test_links_to_one_checkpoint_are_read_once(spiked: Path) -> None:
    for step in (200, 210, 220):
        (spiked / f"checkpoint-{step}").symlink_to(spiked / "checkpoint-60")
    found = looked_at(spiked)
    shared = {id(one.inspection) for one in found.checkpoints if one.step in (60, 200, 210, 220)}
    assert len(shared) == 1
    assert found.checkpoints[-1].missing == ("trainer_state.json was written at step 60",)


def test_pickled_weights_are_not_opened(spiked: Path) -> None:
    folder = spiked / "checkpoint-60"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    found = looked_at(spiked)
    assert verdicts(found)[60] == "unopened"
    assert chosen(found) == 60
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert verdicts(looked_at(spiked))[60] == "incomplete"


def test_a_checkpoint_of_weights_alone_is_chosen_and_its_command_can_be_run(spiked: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (spiked / "checkpoint-60" / name).unlink()
    unmark(spiked / "checkpoint-60")
    found = looked_at(spiked)
    assert verdicts(found)[60] == "healthy"
    assert found.choice.chosen is not None
    assert any("save_only_model" in remark for remark in found.choice.chosen.remarks)
    plan = plan_resume(found, found.choice.chosen, smoothing="floor")
    assert plan.options[plan.options.index("--pss_missing_state") + 1] == "fresh"


@pytest.mark.parametrize(("value", "verdict"), [(1.0, "healthy"), (math.nan, "damaged")])
def test_adapters_in_folders_of_their_own(spiked: Path, value: float, verdict: str) -> None:
    folder = spiked / "checkpoint-60"
    (folder / "model.safetensors").unlink()
    for name, number in (("first", 1.0), ("second", value)):
        (folder / name).mkdir()
        tensors = {"h.0.lora_A.weight": torch.full((4, 8), number)}
        save_file(tensors, folder / name / "adapter_model.safetensors")
    assert verdicts(looked_at(spiked))[60] == verdict


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_a_link_out_of_a_checkpoint_is_not_followed(
    spiked: Path, tmp_path: Path, name: str
) -> None:
    path = spiked / "checkpoint-60" / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    found = looked_at(spiked)
    assert verdicts(found)[60] == "damaged"
    assert f"{name} is a link that leads out" in str(found.checkpoints[2].problem)
    assert found.checkpoints[2].inspection is None


def test_a_checkpoint_that_is_a_link_out_of_the_run(spiked: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "checkpoint-120"
    moved.parent.mkdir()
    link = (spiked / "checkpoint-120").rename(moved) and spiked / "checkpoint-120"
    link.symlink_to(moved)
    found = looked_at(spiked)
    assert verdicts(found)[120] == "damaged"
    assert found.log is not None
    assert found.log.global_step == 100
    assert chosen(looked_at(link)) == 120  # named, it may lie anywhere


def test_a_log_that_is_a_link_out_of_the_run_is_not_read(spiked: Path, tmp_path: Path) -> None:
    shutil.copy(spiked / "checkpoint-120" / "trainer_state.json", tmp_path / "x.json")
    (spiked / "trainer_state.json").unlink(missing_ok=True)
    (spiked / "trainer_state.json").symlink_to(tmp_path / "x.json")
    assert "leads out" in " ".join(looked_at(spiked).unreadable)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="other file systems clamp times")
@pytest.mark.parametrize(("at", "year"), [(1e12, 9999), (-1e10, 1970)])
def test_times_that_no_calendar_holds(at: float, year: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (path := Path(folder, "checkpoint-6", "trainer_state.json")).parent.mkdir()
        path.write_text("{}")
        for one in (path, path.parent):
            os.utime(one, (at, at))
        assert report_on(path.parent).written.year == year


def test_a_checkpoint_alone(spiked: Path) -> None:
    found = looked_at(spiked / "checkpoint-60")
    assert chosen(found) == 60
    assert found.log is not None


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
        if layout == "deepspeed":
            (folder / "latest").write_text("global_step60")
        for name in ("trainer_state.json", "scheduler.pt"):
            shutil.copy(source / name, folder)
        found = looked_at(folder.parent)
        (one,) = found.checkpoints
        assert (one.layout, one.verdict, one.missing) == (layout, "unopened", ())
        assert "not opened" in found.choice.reason
        (folder / files[0]).unlink()
        assert looked_at(folder.parent).checkpoints[0].verdict == "incomplete"


def test_a_folder_without_a_readable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("[]")
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PSSError):
            looked_at(folder)


def test_a_file_that_differs_from_the_marker_makes_it_incomplete(tmp_path: Path) -> None:
    train(tmp_path / "run", PSSConfig.preset("paper"), save_steps=4)
    assert set(verdicts(looked_at(tmp_path / "run")).values()) == {"healthy"}
    path = tmp_path / "run" / "checkpoint-8" / "rng_state.pth"
    path.write_bytes(path.read_bytes() + b"x")
    found = looked_at(tmp_path / "run")
    assert verdicts(found)[8] == "incomplete"
    assert chosen(found) == 4


@pytest.mark.parametrize("name", ["ggml.bin", "notes.pt", "inner/notes.pth"])
def test_an_archive_that_no_trainer_wrote_is_ignored(tmp_path: Path, name: str) -> None:
    train(tmp_path / "run", PSSConfig.preset("paper"), save_steps=4)
    path = tmp_path / "run" / "checkpoint-8" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"ggml")
    assert chosen(looked_at(tmp_path / "run")) == 8
    (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").write_bytes(b"ggml")
    assert verdicts(looked_at(tmp_path / "run"))[8] == "incomplete"


@pytest.mark.parametrize("name", ["checkpoint-last", "checkpoint-epoch-3", "best"])
def test_a_checkpoint_of_any_name_is_judged(spiked: Path, name: str) -> None:
    folder = (spiked / "checkpoint-60").rename(spiked.parent / name)
    found = looked_at(folder)
    assert verdicts(found) == {60: "healthy"}
    (folder / "optimizer.pt").unlink()
    assert verdicts(looked_at(folder)) == {60: "incomplete"}


@pytest.mark.parametrize(
    "reader",
    ["_size_and_time", "layout_of", "_link_out", "open_weights", "examine", "recorded_step"],
)
def test_a_live_run_may_remove_checkpoints_in_the_meantime(
    spiked: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    original = getattr(candidates, reader)

    def removing(folder: Path, **options: object) -> object:
        if folder.name == "checkpoint-60":
            shutil.rmtree(folder, ignore_errors=True)
        return original(folder, **options)

    monkeypatch.setattr(candidates, reader, removing)
    found = looked_at(spiked)
    assert 60 not in verdicts(found)
    assert chosen(found) == 40
    assert any("checkpoint-60 was removed" in note for note in found.notes)


def test_the_noise_floor_is_not_for_weights_that_may_be_trained(
    spiked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not looked_at(spiked).may_raise_to_noise  # a checkpoint before the failure
    for step in (20, 40, 60):
        shutil.rmtree(spiked / f"checkpoint-{step}")
    found = looked_at(spiked)
    assert found.choice.is_last_resort
    assert not found.may_raise_to_noise
    # The first loss is that of random weights, so the low stable ranks are the damage.
    assert investigate(spiked, margin_steps=5, unigram_entropy=3.6).may_raise_to_noise
    monkeypatch.setattr("hf_pss.rescue.candidates.looks_trained", lambda *_: False)
    assert looked_at(spiked).may_raise_to_noise
