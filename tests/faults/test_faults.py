"""Whatever is put into a run, it goes on, ends with finite weights, and says what happened."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoint_differences, events_of, make_trainer
from injectors import DECOMPOSITIONS, FAULTS, LASTING, SKIPPED, Injector
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_pss import PSSCallback, PSSConfig, PSSTrainer, RecoveryConfig
from hf_pss.runs.checkpoint import examine
from hf_pss.runs.folder import checkpoints_by_step
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.safe_checkpoints import SafeCheckpointsMixin
from hf_pss.trainer.trackers import TensorBoardTracker

STEP = 9
OPTIONS: dict[str, Any] = {"max_steps": 20, "save_steps": 2, "save_total_limit": 1}
CONFIG = PSSConfig.preset(
    "paper",
    threshold_ratio=3.0,
    calibration_steps=2,
    cooldown_steps=0,
    max_nonfinite_streak=3,
)
RECOVERY = RecoveryConfig(on_failure="rollback")
# What its event is; a clock that jumps is nobody's business, flipped labels may pass unnoticed.
SEEN_AS = {
    **dict.fromkeys(SKIPPED, ("non_finite", "skip_update")),
    "spike": ("intervention", "act"),
    "decomposition fails": None,
    "clock jumps": None,
    "corrupted batch": None,
    "full disk": ("error", "observe"),
    "NaN buffer": ("non_finite", "observe"),
    "NaN momentum": ("non_finite", "observe"),
    "inf momentum": ("non_finite", "observe"),
    "NaN weight": ("non_finite", "observe"),
    "inf weight": ("non_finite", "observe"),
}


def is_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [STEP, STEP + 1], ids=["between saves", "at a save"])
def test_a_run_survives_each_fault_and_accounts_for_it(
    fault: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, CONFIG, recovery=RECOVERY, **OPTIONS)
    injector = Injector(trainer, {step: fault}, monkeypatch)
    trainer.train()
    assert injector.done == [(step, fault)]
    assert trainer.state.global_step == 20
    assert is_finite(trainer.model)
    *others, last = checkpoints_by_step(tmp_path)
    assert last.name == "checkpoint-20"
    assert examine(last).is_whole
    # While an intervention is under watch, what was before it is kept beyond the limit.
    assert [one.name for one in others] == (["checkpoint-8"] if fault == "spike" else [])
    if (expected := SEEN_AS[fault]) is not None and (fault, step) != ("full disk", STEP):
        found = [(e["kind"], e["decision"]) for e in events_of(tmp_path) if e["step"] >= step]
        assert expected in found[:2]


@pytest.mark.parametrize("name", ["paper", "floor", "anchored"])
@pytest.mark.parametrize("function", DECOMPOSITIONS)
def test_a_decomposition_that_never_works_ends_no_run(
    name: str,
    function: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spikes = {"threshold_ratio": 1.0001, "calibration_steps": 1, "cooldown_steps": 0}
    floors = {"floor_ratio": 1.3, "check_every_steps": 2}
    wanted = {"paper": spikes, "floor": floors, "anchored": {**spikes, **floors}}
    config = PSSConfig.preset(name, **wanted[name])
    trainer = make_trainer(tmp_path, config, max_steps=6)

    original = getattr(torch.linalg, function)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 0:  # the floors are measured once, before the first step
            return original(*args, **kwargs)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, function, fails)
    trainer.train()
    assert trainer.state.global_step == 6
    assert is_finite(trainer.model)
    if function == "eigh":  # what smoothing of small matrices needs
        answers = [e for e in events_of(tmp_path) if e["kind"] == "intervention"]
        assert len(answers) > 1
        assert {m["status"] for answer in answers for m in answer["matrices"]} == {"failed"}


def test_a_tracker_that_fails_ends_no_run_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = PSSConfig.preset(
        "paper", threshold_ratio=1.0001, calibration_steps=1, cooldown_steps=0, health="light"
    )
    options = {"max_steps": 8, "save_steps": 4}
    quiet = make_trainer(tmp_path / "quiet", config, **options)
    quiet.train()
    calls = []

    def fails(self: TensorBoardTracker, *args: Any) -> None:
        calls.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("report", "alert", "snapshot"):
        monkeypatch.setattr(TensorBoardTracker, name, fails)
    folder = tmp_path / "loud"
    trainer = make_trainer(folder, config, report_to="tensorboard", **options)
    trainer.train()
    assert trainer.state.global_step == 8
    assert len(calls) == 1, "it is switched off"
    assert sum("No space left" in record.message for record in caplog.records) == 1
    same = ("kind", "decision", "step", "value")
    said, unsaid = (
        [{key: event[key] for key in same} for event in events_of(one)]
        for one in (folder, tmp_path / "quiet")
    )
    assert said == unsaid
    assert said
    for one, other in zip(trainer.model.parameters(), quiet.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_clocks_that_go_back_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 8, "save_steps": 2, "save_total_limit": 2}
    sound = make_trainer(tmp_path / "sound", CONFIG, recovery=RECOVERY, **options)
    sound.train()
    with monkeypatch.context() as patch:
        trainer = make_trainer(tmp_path / "shifted", CONFIG, recovery=RECOVERY, **options)
        injector = Injector(trainer, {3: "clock jumps", 6: "clock jumps"}, patch)
        trainer.train()
    assert [name for _, name in injector.done] == ["clock jumps"] * 2
    assert [one.name for one in checkpoints_by_step(tmp_path / "shifted")] == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert 0 <= PSSCallback.of(trainer).report.scalars["seconds"] < 60
    for one, other in zip(trainer.model.parameters(), sound.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- the mixins without PSS ----


class SafeTrainer(SafeCheckpointsMixin, Trainer):
    """Safe checkpoints, and no PSSCallback."""


class RollbackTrainer(RollbackMixin, Trainer):
    """Safe checkpoints and rollback, and no PSSCallback."""


class SendsItselfSigterm(TrainerCallback):
    """Stands for a scheduler that ends the job within a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("fault", [*LASTING, "NaN buffer", "full disk"])
@pytest.mark.parametrize("step", [STEP, STEP + 1], ids=["between saves", "at a save"])
def test_rollback_without_pss_survives_what_a_save_finds(
    fault: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, trainer_class=RollbackTrainer, recovery=RECOVERY, **OPTIONS)
    injector = Injector(trainer, {step: fault}, monkeypatch)
    trainer.train()
    assert injector.done == [(step, fault)]
    assert trainer.state.global_step == 20
    assert is_finite(trainer.model)
    assert [one.name for one in checkpoints_by_step(tmp_path)] == ["checkpoint-20"]
    assert examine(tmp_path / "checkpoint-20").is_whole
    assert events_of(tmp_path) == []


@pytest.mark.parametrize("fault", [*LASTING, "NaN buffer", "full disk"])
def test_safe_checkpoints_without_pss_keep_the_last_whole_one(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, trainer_class=SafeTrainer, **OPTIONS)
    with monkeypatch.context() as patch:
        Injector(trainer, {STEP + 1: fault}, patch)
        trainer.train()
    assert trainer.state.global_step == 20
    saved = checkpoints_by_step(tmp_path)
    is_lasting = fault != "full disk"
    assert [one.name for one in saved] == ["checkpoint-8" if is_lasting else "checkpoint-20"]
    assert examine(saved[-1]).is_whole
    assert ("is not saved" if is_lasting else "could not be written") in caplog.text
    if not is_lasting:
        return
    again = make_trainer(tmp_path, trainer_class=SafeTrainer, **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert is_finite(again.model)
    assert [one.name for one in checkpoints_by_step(tmp_path)] == ["checkpoint-20"]


@pytest.mark.parametrize("trainer_class", [SafeTrainer, RollbackTrainer])
def test_sigterm_without_pss_saves_the_step_and_a_resume_is_exact(
    trainer_class: type[Trainer], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 8, "save_steps": 8, "trainer_class": trainer_class}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    stopped = make_trainer(tmp_path / "parts", **options)
    stopped.add_callback(SendsItselfSigterm())
    with pytest.raises(SystemExit) as caught:
        stopped.train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert [one.name for one in checkpoints_by_step(tmp_path / "parts")] == ["checkpoint-5"]
    resumed = make_trainer(tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    ends = [tmp_path / name / "checkpoint-8" for name in ("whole", "parts")]
    assert checkpoint_differences(*ends) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- folders ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB: it holds one checkpoint of 90 KB, and no three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
        ).returncode
    ):
        pytest.skip("mounting needs root")
    yield folder
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_it_has(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No rotation: the third save finds no room; the two before it stay, and are resumed."""
    options = {"max_steps": 8, "save_steps": 2}
    make_trainer(small_disk, PSSConfig.preset("paper"), **options).train()
    found = checkpoints_by_step(small_disk)
    assert 1 <= len(found) < 4
    assert all(examine(folder).is_whole for folder in found)
    assert "could not be written" in caplog.text
    again = make_trainer(small_disk, PSSConfig.preset("paper"), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def test_a_folder_that_became_read_only_ends_no_run(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Freezes(PSSTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._save_checkpoint(*args, **kwargs)
            # The run's lock is open for writing, so the disk itself cannot be remounted.
            disk = str(small_disk)
            subprocess.run(["mount", "--bind", disk, disk], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)

    caplog.set_level(logging.WARNING)
    trainer = make_trainer(
        small_disk, PSSConfig.preset("paper"), trainer_class=Freezes, max_steps=8, save_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 8
    (first,) = checkpoints_by_step(small_disk)
    assert first.name == "checkpoint-2"
    assert examine(first).is_whole
    assert "Read-only file system" in caplog.text
