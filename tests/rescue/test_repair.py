"""A repaired copy: the files that change, those that stay, and that a plain Trainer resumes it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_runs import NUM_STEPS
from helpers import (
    MODELS,
    controller_of,
    differences,
    gpt2,
    make_trainer,
    opens_pickles,
    train,
    weights_of,
)
from loops import stable_rank64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_pss import PSSConfig, PSSController, select_matrices
from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.linalg import noise_stable_rank
from hf_pss.rescue import repair
from hf_pss.rescue.candidates import CheckpointReport, report_on
from hf_pss.rescue.repair import (
    RECORD_FILE,
    Repairs,
    require_torch,
    rewrite_optimizer,
    write_repaired,
)
from hf_pss.rescue.smoothed_weights import matrices_to_smooth
from hf_pss.runs.folder import OPTIONS_FILE
from hf_pss.runs.safetensors_files import open_checkpoint

RunOf = Callable[..., Path]

# Relative, against the run's own smoothing, which stacks matrices of a shape: worst 2.7e-6.
LIVE_TOLERANCE = 8e-6
# Relative, exact stable rank below the floor: worst 2.6e-6.
FLOOR_TOLERANCE = 7e-6
CONSTANT = {"max_steps": NUM_STEPS, "lr_scheduler_type": "constant", "learning_rate": 1e-2}


@pytest.fixture
def damaged(run_of: RunOf) -> CheckpointReport:
    return report_on(run_of("huge_rate") / "checkpoint-80")


def repaired(one: CheckpointReport, target: Path, **options: Any) -> Path:
    return write_repaired(one, target, Repairs(**options)).path


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_copy_without_repairs_is_the_checkpoint(
    damaged: CheckpointReport, tmp_path: Path
) -> None:
    before = files_of(damaged.path)
    written = write_repaired(damaged, tmp_path / "out", Repairs(smoothing="none"))
    after = files_of(written.path)
    assert after.pop(RECORD_FILE)
    assert before.pop("training_args.bin")
    assert after == before
    assert files_of(damaged.path).keys() == before.keys() | {"training_args.bin"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("smoothing", ["clip", "log", "polar"])
def test_smoothed_weights_equal_those_of_a_live_run(
    damaged: CheckpointReport, tmp_path: Path, smoothing: str
) -> None:
    out = repaired(damaged, tmp_path / "out", smoothing=smoothing)
    model = AutoModelForCausalLM.from_pretrained(damaged.path)
    original = weights_of(model)
    PSSController(model, PSSConfig.preset("paper", smoothing=smoothing)).smooth_now()
    expected, found = weights_of(model), weights_of(AutoModelForCausalLM.from_pretrained(out))
    assert expected.keys() == found.keys()
    differing = [float((one - found[name]).norm() / one.norm()) for name, one in expected.items()]
    assert max(differing) <= LIVE_TOLERANCE
    # The check can fail: without smoothing the difference is large.
    assert max(float((one - original[name]).norm()) for name, one in expected.items()) > 1


def test_the_floor_is_reached(damaged: CheckpointReport, tmp_path: Path) -> None:
    """A run uses eight triplets that it has measured; the copy computes the leading ones again."""
    out = repaired(damaged, tmp_path / "out", smoothing="floor")
    model = AutoModelForCausalLM.from_pretrained(out)
    parameters = dict(model.named_parameters())
    views = select_matrices(model).matrices
    assert len(views) == 12
    for view in views:
        (matrix,) = view.read(parameters[view.parameter_name].detach()).reshape(-1, *view.shape)
        assert stable_rank64(matrix) >= (1 - FLOOR_TOLERANCE) * noise_stable_rank(*view.shape)


def test_only_selected_matrices_change(damaged: CheckpointReport, tmp_path: Path) -> None:
    out = repaired(damaged, tmp_path / "out", smoothing="clip")
    before, after = (load_file(folder / "model.safetensors") for folder in (damaged.path, out))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert changed == {view.parameter_name for view in select_matrices(model).matrices}
    assert "lm_head.weight" not in after  # tied, and lies in the file once
    headers = []
    for folder in (damaged.path, out):
        with safe_open(folder / "model.safetensors", "pt") as file:
            headers.append(file.metadata())
    assert headers == [{"format": "pt"}] * 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_and_dtypes_survive(
    tmp_path: Path, damaged: CheckpointReport, name: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / "checkpoint-80"
    folder.mkdir()
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.save_pretrained(folder, max_shard_size="8KB")
    for other in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        shutil.copy(damaged.path / other, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    views = {view.name for view in select_matrices(model).matrices}
    assert {one.name for one in matrices_to_smooth(open_checkpoint(folder))} == views
    out = repaired(report_on(folder), tmp_path / "out", smoothing="clip")
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
            k: (v.dtype, v.shape) for k, v in after.items()
        }
    AutoModelForCausalLM.from_pretrained(out)


def test_a_plain_trainer_resumes_from_the_copy(damaged: CheckpointReport, tmp_path: Path) -> None:
    out = repaired(damaged, tmp_path / "out", smoothing="floor")
    model = gpt2(num_layers=2, width=32)
    trainer = train(tmp_path / "run", resume=str(out), model=model, **CONSTANT)
    assert trainer.state.global_step == NUM_STEPS
    steps = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert steps == list(range(1, NUM_STEPS + 1))
    # Moments were kept: Adam has counted from the first step.
    state = torch.load(tmp_path / "run" / f"checkpoint-{NUM_STEPS}" / "optimizer.pt")
    assert {float(one["step"]) for one in state["state"].values()} == {NUM_STEPS}


@opens_pickles
def test_reset_moments_and_scaled_rates(damaged: CheckpointReport, tmp_path: Path) -> None:
    out = repaired(damaged, tmp_path / "out", moments="reset", lr_scale=0.25, allow_pickle=True)
    model = gpt2(num_layers=2, width=32)
    trainer = train(tmp_path / "run", resume=str(out), model=model, **CONSTANT)
    rates = {
        row["step"]: row["learning_rate"] for row in trainer.state.log_history if "loss" in row
    }
    assert rates[80] == 1e-2
    assert rates[81] == rates[NUM_STEPS] == 0.25e-2
    state = torch.load(tmp_path / "run" / f"checkpoint-{NUM_STEPS}" / "optimizer.pt")
    assert {float(one["step"]) for one in state["state"].values()} == {NUM_STEPS - 80}


def test_skipped_batches(damaged: CheckpointReport, tmp_path: Path) -> None:
    """The batches after the resume are those of ten steps later in the run that was not skipped."""

    def batches_of(source: Path, folder: str) -> list[list[int]]:
        seen: list[list[int]] = []

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            seen.append(batch["input_ids"][:, 0].tolist())
            return batch

        trainer = make_trainer(tmp_path / folder, model=gpt2(2, 32), **CONSTANT)
        trainer.data_collator = collate
        trainer.train(resume_from_checkpoint=str(source))
        return seen

    plain = repaired(damaged, tmp_path / "plain")
    skipped = repaired(damaged, tmp_path / "skipped", skip_batches=10)
    all_of_them, fewer = batches_of(plain, "a"), batches_of(skipped, "b")
    assert len(fewer) == len(all_of_them) - 10  # both with one that is fetched ahead
    assert fewer == all_of_them[10:]


def test_the_state_of_pss_goes_along(tmp_path: Path) -> None:
    train(tmp_path / "run", PSSConfig.preset("floor"), save_steps=4)
    one = report_on(tmp_path / "run" / "checkpoint-4")
    out = repaired(one, tmp_path / "out", skip_batches=2)
    resumed = train(tmp_path / "next", PSSConfig.preset("floor"), resume=str(out))
    assert controller_of(resumed).step_number == 8
    assert resumed.state.global_step == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "reset"}, "--allow-pickle"),
        ({"lr_scale": 0.5}, "--allow-pickle"),
        ({"moments": "project", "allow_pickle": True}, "--pss_moments project"),
    ],
)
def test_options_that_need_other_options_are_refused(
    damaged: CheckpointReport, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        repaired(damaged, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_targets_that_are_refused(damaged: CheckpointReport, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in ("there", "link", "no/parent"):
        with pytest.raises(ConfigurationError):
            repaired(damaged, tmp_path / target)
    before = files_of(damaged.path)
    with pytest.raises(ConfigurationError):
        repaired(damaged, damaged.path / "out")
    assert files_of(damaged.path) == before


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/hf_pss_was_here",))


def copy_of(one: CheckpointReport, folder: Path) -> Path:
    return Path(shutil.copytree(one.path, folder / one.path.name))


@pytest.mark.parametrize("kind", ["program", "cut", "list", "no groups"])
@opens_pickles
def test_a_hostile_optimizer_is_an_error(
    damaged: CheckpointReport, tmp_path: Path, kind: str
) -> None:
    copy = copy_of(damaged, tmp_path)
    path = copy / "optimizer.pt"
    whole = path.read_bytes()
    content: dict[str, Any] = {"program": {"state": _Evil()}, "list": [1], "no groups": {}}
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save(content[kind], path)
    if kind == "program":
        assert pickle.dumps(_Evil())
    with pytest.raises(StateError):
        repaired(report_on(copy), tmp_path / "out", moments="reset", allow_pickle=True)
    assert not Path("/tmp/hf_pss_was_here").exists()
    assert os.listdir(tmp_path) == [copy.name]


@pytest.mark.parametrize(
    "name", ["vocab.json", "trainer_state.json", "optimizer.pt", "scheduler.pt"]
)
@opens_pickles
def test_a_link_that_leads_out_is_not_followed(
    damaged: CheckpointReport, tmp_path: Path, name: str
) -> None:
    copy = copy_of(damaged, tmp_path)
    report = report_on(copy)
    there = copy / name
    secret = there.rename(tmp_path / "secret") if there.exists() else tmp_path / "secret"
    secret.touch()
    there.symlink_to(secret)
    with pytest.raises(StateError, match="leads out"):
        repaired(report, tmp_path / "out", moments="reset", lr_scale=0.5, allow_pickle=True)
    assert sorted(os.listdir(tmp_path)) == [copy.name, "secret"]


def test_the_mode_comes_last(
    damaged: CheckpointReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint that nobody may write to, which its copy has to be until it is done."""
    copy = copy_of(damaged, tmp_path)
    copy.chmod(0o555)
    modes = []
    original = repair.write_weights

    def looking(checkpoint: Any, source: Path, folder: Path, smoothing: str) -> Any:
        modes.append(folder.stat().st_mode & 0o777)
        return original(checkpoint, source, folder, smoothing)

    monkeypatch.setattr(repair, "write_weights", looking)
    out = repaired(report_on(copy), tmp_path / "out")
    assert modes == [0o700]
    assert out.stat().st_mode & 0o777 == 0o555
    out.chmod(0o755)  # pytest removes it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@opens_pickles
def test_a_full_disk_is_an_error_of_the_system(damaged: CheckpointReport) -> None:
    """Where torch raises a RuntimeError of its archive writer."""
    with pytest.raises(OSError, match="disk may be full"):
        rewrite_optimizer(damaged.path / "optimizer.pt", Path("/dev/full"), "keep", 0.5)


def test_a_file_system_that_flushes_no_folders_is_enough(
    damaged: CheckpointReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuses_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert repaired(damaged, tmp_path / "out").is_dir()


def test_the_options_of_the_run_go_along(damaged: CheckpointReport, tmp_path: Path) -> None:
    copy = copy_of(damaged, tmp_path)
    beside, report = tmp_path / OPTIONS_FILE, report_on(copy)
    beside.write_text('{"version": 1}')
    one = repaired(report, tmp_path / "one")
    assert (one / OPTIONS_FILE).read_bytes() == beside.read_bytes()
    beside.write_text("{")  # damaged: nothing to go by
    assert not (repaired(report, tmp_path / "two") / OPTIONS_FILE).exists()


def test_an_error_while_writing_leaves_no_files(
    damaged: CheckpointReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repair, "_write_state", full)
    with pytest.raises(OSError, match="No space"):
        repaired(damaged, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_writing_leaves_no_files(
    damaged: CheckpointReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def terminated(*_: Any) -> None:
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(repair, "_write_state", terminated)
    # Without the mend, the handler of this test is called instead of ending pytest.
    before = signal.signal(getattr(signal, name), lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            repaired(damaged, tmp_path / "out")
    finally:
        signal.signal(getattr(signal, name), before)
    assert os.listdir(tmp_path) == []


def test_adapters_are_smoothed_in_a_run_only(damaged: CheckpointReport, tmp_path: Path) -> None:
    copy = copy_of(damaged, tmp_path)
    (copy / "model.safetensors").unlink()
    factor = {"base_model.model.h.0.q.lora_A.weight": torch.randn(4, 8)}
    save_file(factor, copy / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match="LoRA"):
        repaired(report_on(copy), tmp_path / "out", smoothing="floor")
    repaired(report_on(copy), tmp_path / "out")


@opens_pickles
def test_old_versions_of_torch_open_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    require_torch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(PSSError, match=r"2\.10"):
        require_torch()


def test_the_record_lists_the_repairs(damaged: CheckpointReport, tmp_path: Path) -> None:
    out = repaired(damaged, tmp_path / "out", skip_batches=3, smoothing="floor")
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["step"] == 83
    assert record["smoothing"] == "floor"
    assert any(one["changed"] for one in record["matrices"])
    state = json.loads((out / "trainer_state.json").read_text())
    original = json.loads((damaged.path / "trainer_state.json").read_text())
    assert list(differences(original, state)) == ["/global_step: 80 != 83"]
