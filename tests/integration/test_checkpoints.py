"""Checkpoints are there in full and finite, or not there; only whole ones are resumed."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    MAX_STEPS,
    checkpoint_differences,
    differences,
    gpt2,
    history,
    make_trainer,
    run_differences,
    token_rows,
    train,
    weights_of,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_pss import PSSConfig, PSSTrainer, RecoveryConfig
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.runs.checkpoint import examine, read_marker, write_marker
from hf_pss.runs.folder import LOCK, MARKER, STAGING, locked
from hf_pss.trainer import stop_signals
from hf_pss.trainer.resuming import newest_whole
from hf_pss.trainer.schedule_free import schedule_free

MIDDLE = 4
CONFIG = PSSConfig.preset("paper")


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def run(folder: Path, **options: Any) -> Any:
    return train(folder, CONFIG, **options)


def differences_at_the_end(one: Trainer, other: Trainer) -> list[str]:
    """Compare an uninterrupted run with one that was resumed; the last line sums up a session."""
    last = f"checkpoint-{one.state.global_step}"
    folders = [Path(trainer.args.output_dir) / last for trainer in (one, other)]
    return [
        *differences(history(one)[:-1], history(other)[:-1], "log"),
        *differences(weights_of(one.model), weights_of(other.model), "model"),
        *checkpoint_differences(*folders),
    ]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, its checkpoints at 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, save_steps=2)
    return folder


@pytest.fixture
def copied_run(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


# ---- saving ----


def test_a_checkpoint_has_a_marker_of_all_its_files_and_nothing_is_left_over(
    saved_run: Path,
) -> None:
    assert checkpoints_in(saved_run) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert not (saved_run / STAGING).exists()
    folder = saved_run / "checkpoint-8"
    marker = read_marker(folder)
    assert marker is not None
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MARKER}
    assert marker == sizes
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= sizes.keys()
    assert examine(folder).is_whole


def test_the_run_and_its_checkpoints_are_the_plain_trainers_bit_for_bit(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    safe = run(tmp_path / "safe")
    assert run_differences(plain, safe) == []


def test_a_plain_trainer_resumes_ours_and_we_resume_its(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steady = {"lr_scheduler_type": "constant"}
    half = {"save_steps": MIDDLE, "max_steps": MIDDLE, **steady}
    whole = train(tmp_path / "whole", **steady)
    run(tmp_path / "ours", **half)
    theirs = train(tmp_path / "ours", resume=True, **steady)
    assert differences_at_the_end(whole, theirs) == []
    train(tmp_path / "theirs", **half)
    ours = run(tmp_path / "theirs", resume=True, **steady)
    assert differences_at_the_end(whole, ours) == []
    assert "checkpoint-4 has no marker of PSS, so a plain Trainer wrote it" in caplog.text


def test_the_best_checkpoint_is_named_and_loaded_as_by_the_plain_trainer(tmp_path: Path) -> None:
    found = {}
    for name, options in (("plain", {}), ("safe", {"pss": CONFIG})):
        trainer = make_trainer(
            tmp_path / name,
            eval_rows=token_rows(8),
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            **options,
        )
        trainer.train()
        text = (tmp_path / name / "checkpoint-8" / "trainer_state.json").read_text()
        best = json.loads(text)["best_model_checkpoint"]
        assert best == os.path.join(trainer.args.output_dir, "checkpoint-8")
        found[name] = (checkpoints_in(tmp_path / name), weights_of(trainer.model))
    assert found["plain"][0] == found["safe"][0]
    assert list(differences(found["plain"][1], found["safe"][1])) == []


def test_a_step_that_is_saved_twice_replaces_the_first(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    leftover = tmp_path / "checkpoint-8" / "checkpoint-is-incomplete.txt"
    leftover.touch()  # as by JITCheckpointCallback, which makes the folder before it saves
    trainer._save_checkpoint(trainer.model, None)
    assert not leftover.exists()
    assert examine(tmp_path / "checkpoint-8").is_whole
    assert not (tmp_path / STAGING).exists()


class PushSeen(PSSTrainer):
    pushed: list[tuple[str, bool]]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.args.push_to_hub = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.push_to_hub = False


def test_an_upload_sees_the_checkpoint_under_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, checkpoint_folder: pushed.append(
            (checkpoint_folder, Path(checkpoint_folder, MARKER).is_file())
        ),
    )
    run(tmp_path, trainer_class=PushSeen)
    assert pushed == [(str(tmp_path / "checkpoint-8"), True)]


# ---- weights that are not finite ----


class Break(TrainerCallback):
    """Puts NaN or inf into what belongs to the model or its optimizer, after the given step."""

    def __init__(self, step: int, where: Callable[[Any, Any], torch.Tensor], value: float) -> None:
        self.step, self.where, self.value = step, where, value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                self.where(kwargs["model"], kwargs["optimizer"]).view(-1)[0] = self.value


def a_weight(model: Any, optimizer: Any) -> torch.Tensor:
    return model.get_parameter("transformer.h.0.mlp.c_fc.weight")


def a_momentum(model: Any, optimizer: Any) -> torch.Tensor:
    return optimizer.state[a_weight(model, optimizer)]["exp_avg"]


def a_buffer(model: Any, optimizer: Any) -> torch.Tensor:
    return model.get_buffer("transformer.running")


def a_list_of_the_optimizer(model: Any, optimizer: Any) -> torch.Tensor:
    """Of the kind that SOAP and Shampoo keep, of which the optimizer in these tests reads none."""
    factors = {"left": [torch.zeros(2, 2), None], "right": (torch.zeros(3),)}
    optimizer.state[a_weight(model, optimizer)]["factors"] = factors
    return factors["right"][0]


WHERE = {
    "weight": a_weight,
    "momentum": a_momentum,
    "list": a_list_of_the_optimizer,
    "buffer": a_buffer,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("step", [2, 3, 5, 8])
def test_with_a_limit_of_one_a_healthy_checkpoint_remains(
    step: int, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, CONFIG, save_steps=1, save_total_limit=1)
    trainer.model.transformer.register_buffer("running", torch.zeros(3))
    trainer.add_callback(Break(step, WHERE[where], math.nan))
    trainer.train()
    (name,) = checkpoints_in(tmp_path)
    assert name == f"checkpoint-{step - 1}"
    assert examine(tmp_path / name).is_whole
    weights = load_file(tmp_path / name / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert f"Step {step} is not saved" in caplog.text


@pytest.mark.parametrize("event", ["on_log", "on_evaluate"])
def test_weights_that_break_after_the_end_of_a_step_are_not_saved(
    event: str, tmp_path: Path
) -> None:
    def breaks(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            with torch.no_grad():
                a_weight(kwargs["model"], None).fill_(math.nan)

    trainer = make_trainer(
        tmp_path, CONFIG, save_steps=2, eval_strategy="steps", eval_steps=2, eval_rows=token_rows(4)
    )
    trainer.add_callback(type("Breaks", (TrainerCallback,), {event: breaks})())
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-2"]


def test_the_plain_trainer_keeps_the_broken_one_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_steps=1, save_total_limit=1)
    trainer.add_callback(Break(5, a_weight, math.nan))
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-8"]
    weights = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert not all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_mask_of_inf_in_a_buffer_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG)
    trainer.model.transformer.register_buffer("running", torch.full((3,), -math.inf))
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-8"]


class Saves(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()
        self.steps.append(state.global_step)


def test_on_save_is_not_called_for_a_refused_save(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG, save_steps=2)
    trainer.add_callback(Break(5, a_weight, math.inf))
    trainer.add_callback(saves := Saves())
    trainer.train()
    assert saves.steps == [2, 4]


# ---- rotation ----


def test_rotation_goes_by_steps_and_not_by_a_clock_that_jumps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG, save_steps=2, save_total_limit=2)

    class ClockJumps(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            when = 2e9 - 1e6 * state.global_step  # every save is older than the one before
            os.utime(tmp_path / f"checkpoint-{state.global_step}", (when, when))

    trainer.add_callback(ClockJumps())
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_rotation_keeps_a_new_save_before_later_steps_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-900").mkdir()
    run(tmp_path, save_total_limit=1)
    assert checkpoints_in(tmp_path) == ["checkpoint-8"]


def test_checkpoints_of_an_earlier_run_go_first_and_are_not_resumed(
    saved_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (900, 1000):
        shutil.copytree(saved_run / "checkpoint-8", tmp_path / f"checkpoint-{step}")
    run(tmp_path, max_steps=2, save_steps=2, save_total_limit=2)
    assert checkpoints_in(tmp_path) == ["checkpoint-1000", "checkpoint-2"]
    assert newest_whole(tmp_path).path.name == "checkpoint-2"
    assert "checkpoint-1000: an earlier run wrote it" in caplog.text
    run(tmp_path, max_steps=4, save_steps=2, save_total_limit=2, resume=True)
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_one_of_an_earlier_run_that_is_named_is_the_newest_again(copied_run: Path) -> None:
    run(copied_run, max_steps=2)
    assert newest_whole(copied_run).path.name == "checkpoint-2"
    run(copied_run, resume=str(copied_run / "checkpoint-6"), max_steps=6)
    assert newest_whole(copied_run).path.name == "checkpoint-6"


def test_a_step_that_is_reached_again_is_of_this_run(copied_run: Path) -> None:
    run(copied_run, max_steps=6, save_steps=2)
    assert newest_whole(copied_run).path.name == "checkpoint-6"


# ---- resuming ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_weights(folder: Path) -> None:
    truncate(folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_state(folder: Path) -> None:
    truncate(folder / "trainer_state.json")


def no_state(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def cut_random_state(folder: Path) -> None:
    truncate(folder / "rng_state.pth")


def cut_optimizer(folder: Path) -> None:
    truncate(folder / "optimizer.pt")


def no_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def no_scheduler(folder: Path) -> None:
    (folder / "scheduler.pt").unlink()


def cut_scheduler(folder: Path) -> None:
    truncate(folder / "scheduler.pt")


def nan_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FATAL = (cut_weights, no_weights, cut_state, no_state)
PARTIAL = (cut_optimizer, no_optimizer, cut_scheduler, no_scheduler, cut_random_state)


def reshard(folder: Path) -> None:
    """Save the weights in shards, as people do who move them to another machine."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file()


def convert(folder: Path) -> None:
    """Save the weights in another dtype."""
    GPT2LMHeadModel.from_pretrained(folder).double().save_pretrained(folder)


def pickle_weights(folder: Path) -> None:
    """Save the weights as torch does, for a program that reads no safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    reshard(folder)
    min(folder.glob("model-*.safetensors")).unlink()


@pytest.mark.parametrize("change", [reshard, convert, pickle_weights])
def test_weights_that_a_person_saved_again_are_whole_by_their_own_account(
    change: Callable[[Path], None], copied_run: Path
) -> None:
    change(copied_run / "checkpoint-8")
    assert examine(copied_run / "checkpoint-8").problem is None
    trainer = make_trainer(copied_run, CONFIG, max_steps=10)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10


def test_a_shard_that_is_lost_is_still_named(copied_run: Path) -> None:
    lose_a_shard(copied_run / "checkpoint-8")
    assert examine(copied_run / "checkpoint-8").problem is not None


def unmark(folder: Path) -> None:
    (folder / MARKER).unlink()


def make_deepspeed(folder: Path, *, ranks: int = 4) -> Path:
    """Turn a checkpoint into one that has the file names of DeepSpeed ZeRO-2."""
    (folder / "optimizer.pt").unlink()
    (folder / "rng_state.pth").unlink()
    unmark(folder)
    step = folder / "global_step8"
    step.mkdir()
    (folder / "latest").write_text(step.name)
    torch.save({}, step / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        torch.save({}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return step


@pytest.mark.parametrize("rank", [1, 3])
def test_a_deepspeed_checkpoint_without_the_file_of_one_rank_names_the_rank(
    rank: int, copied_run: Path
) -> None:
    folder = copied_run / "checkpoint-8"
    step = make_deepspeed(folder)
    assert examine(folder).problem is None
    name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    (step / name).unlink()
    assert examine(folder).problem == f"{step.name}/{name} is missing"


@pytest.mark.parametrize("tag", ["global_step99", "", "../checkpoint-6", "\0"])
def test_a_latest_that_leads_nowhere_is_named(tag: str, copied_run: Path) -> None:
    folder = copied_run / "checkpoint-8"
    make_deepspeed(folder)
    (folder / "latest").write_text(tag)
    assert "that latest names is missing" in str(examine(folder).problem)


def test_an_fsdp_checkpoint_without_a_file_that_its_metadata_names(copied_run: Path) -> None:
    folder = copied_run / "checkpoint-8"
    (folder / "optimizer.pt").unlink()
    unmark(folder)
    for inner in ("pytorch_model_fsdp_0", "optimizer_0"):
        for name in ("__0_0.distcp", "__1_0.distcp"):
            (folder / inner).mkdir(exist_ok=True)
            (folder / inner / name).touch()
        with (folder / inner / ".metadata").open("wb") as stream:
            pickle.dump({"storage": ["__0_0.distcp", "__1_0.distcp"]}, stream)
    assert examine(folder).is_whole
    (folder / "pytorch_model_fsdp_0" / "__1_0.distcp").unlink()
    assert examine(folder).problem == "pytorch_model_fsdp_0/__1_0.distcp is missing"


def test_one_shard_of_five_without_an_index_is_incomplete(copied_run: Path) -> None:
    folder = copied_run / "checkpoint-8"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00005.safetensors")
    unmark(folder)
    problem = examine(folder).problem
    assert problem is not None
    assert "model.safetensors.index.json is missing" in problem
    assert "model-00002-of-00005.safetensors is missing" in problem
    assert newest_whole(copied_run).path.name == "checkpoint-6"


@pytest.mark.parametrize("is_marked", [True, False], ids=["marked", "unmarked"])
def test_files_of_other_programs_do_not_count(is_marked: bool, copied_run: Path) -> None:
    folder = copied_run / "checkpoint-8"
    for name in ("ggml.bin", "notes.pt", "gguf/weights.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not an archive")
    if not is_marked:
        unmark(folder)
    assert examine(folder).is_whole


@pytest.mark.parametrize("is_marked", [True, False], ids=["marked", "unmarked"])
def test_weights_alone_are_named_so_and_resumed_on_request(is_marked: bool, tmp_path: Path) -> None:
    run(tmp_path, max_steps=2, save_steps=2, save_only_model=True)
    if not is_marked:
        unmark(tmp_path / "checkpoint-2")
    with pytest.raises(StateError, match="only weights, as save_only_model=True") as caught:
        run(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert "optimizer.pt is missing" not in str(caught.value)
    fresh = RecoveryConfig(missing_state="fresh")
    assert run(tmp_path, max_steps=4, resume=True, recovery=fresh).state.global_step == 4


@pytest.mark.parametrize("damage", [*FATAL, *PARTIAL])
@pytest.mark.parametrize("is_marked", [True, False], ids=["marked", "unmarked"])
def test_resume_takes_the_newest_whole_one_and_logs_the_others(
    damage: Callable[[Path], None],
    is_marked: bool,
    copied_run: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(copied_run / "checkpoint-8")
    damage(copied_run / "checkpoint-6")
    if not is_marked:
        for step in (2, 4, 6, 8):
            unmark(copied_run / f"checkpoint-{step}")
    whole = run(copied_run.parent / "whole")
    resumed = run(copied_run, resume=True)
    assert differences_at_the_end(whole, resumed) == []
    messages = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Skipping ")]
    assert [Path(m.split()[1].rstrip(":")).name for m in messages] == [
        "checkpoint-8",
        "checkpoint-6",
    ]


def test_weights_that_are_not_finite_are_passed_over_without_a_marker(
    copied_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nan_weights(copied_run / "checkpoint-8")
    unmark(copied_run / "checkpoint-8")
    run(copied_run, resume=True)
    assert "holds NaN or inf, in transformer.wte.weight" in caplog.text


def test_a_float64_weight_beyond_float32_is_finite(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    assert "NaN" not in str(examine(tmp_path))
    save_file({"w": torch.tensor([math.inf])}, tmp_path / "model.safetensors")
    assert "NaN" in str(examine(tmp_path))


@pytest.mark.parametrize("damage", [*FATAL, *PARTIAL])
def test_one_that_was_named_and_is_not_whole_is_refused(
    damage: Callable[[Path], None], copied_run: Path
) -> None:
    damage(copied_run / "checkpoint-8")
    words = "find a valid checkpoint" if damage in FATAL else "is incomplete"
    with pytest.raises(StateError, match=words):
        run(copied_run, resume=str(copied_run / "checkpoint-8"))


@pytest.mark.parametrize("damage", [cut_optimizer, no_optimizer, cut_scheduler, no_scheduler])
def test_without_any_whole_one_the_error_names_the_choices(
    damage: Callable[[Path], None], copied_run: Path
) -> None:
    for step in (2, 4, 6, 8):
        damage(copied_run / f"checkpoint-{step}")
    with pytest.raises(StateError, match=r"missing_state='fresh'"):
        run(copied_run, resume=True)


def test_errors_for_an_empty_folder_and_for_a_damaged_run_differ(copied_run: Path) -> None:
    with pytest.raises(StateError, match="No valid checkpoint found"):
        run(copied_run / "nowhere", resume=True)
    for step in (2, 4, 6, 8):
        no_weights(copied_run / f"checkpoint-{step}")
    with pytest.raises(StateError, match=r"checkpoint-8: model.safetensors.*Start the run again"):
        run(copied_run, resume=True)


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.rate = 0.0
        self.has_state = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.has_state = bool(kwargs["optimizer"].state)


@pytest.mark.parametrize("damage", [cut_optimizer, no_optimizer, cut_scheduler, no_scheduler])
def test_missing_state_fresh_loads_the_readable_part_and_places_the_schedule(
    damage: Callable[[Path], None], copied_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied_run / "checkpoint-4"
    intact = make_trainer(copied_run.parent / "intact", CONFIG)
    intact.add_callback(wanted := Rates())
    intact.train(resume_from_checkpoint=str(folder))
    damage(folder)
    trainer = make_trainer(
        copied_run.parent / "out",
        PSSConfig.preset("paper"),
        recovery=RecoveryConfig(missing_state="fresh"),
    )
    trainer.add_callback(rates := Rates())
    trainer.train(resume_from_checkpoint=str(folder))
    assert rates.rate == wanted.rate < 3e-3
    assert rates.has_state == (damage in (cut_scheduler, no_scheduler))
    assert "that part starts from its initial state" in caplog.text
    if rates.has_state:  # only the schedule was missing, and the step says where it stood
        assert list(differences(weights_of(intact.model), weights_of(trainer.model))) == []


def test_missing_state_fresh_restarts_a_cut_random_state(copied_run: Path) -> None:
    cut_random_state(copied_run / "checkpoint-4")
    trainer = make_trainer(
        copied_run.parent / "out",
        PSSConfig.preset("paper"),
        recovery=RecoveryConfig(missing_state="fresh"),
    )
    trainer.train(resume_from_checkpoint=str(copied_run / "checkpoint-4"))
    assert trainer.state.global_step == MAX_STEPS


def test_an_optimizer_of_fsdp2_is_not_dropped_for_want_of_a_schedule(copied_run: Path) -> None:
    folder = copied_run / "checkpoint-4"
    unmark(folder)
    no_scheduler(folder)
    shutil.copy(folder / "optimizer.pt", folder / "pytorch_model_fsdp.bin")
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    trainer = make_trainer(
        copied_run.parent / "out",
        PSSConfig.preset("paper"),
        recovery=RecoveryConfig(missing_state="fresh"),
    )
    with pytest.raises(StateError, match=r"optimizer's state without scheduler.pt"):
        trainer._load_optimizer_and_scheduler(str(folder))


def test_a_state_that_was_edited_by_hand_is_whole(copied_run: Path) -> None:
    path = copied_run / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "save_steps": 3}))
    assert examine(path.parent).is_whole


def test_files_that_no_resume_reads_may_change(copied_run: Path) -> None:
    folder = copied_run / "checkpoint-8"
    (folder / "README.md").write_text("A model of ours.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_marker(folder, step=8)
    (folder / "README.md").write_text("Another.")
    (folder / "chat_template.jinja").unlink()
    (folder / "training_args.bin").unlink()
    assert examine(folder).is_whole
    assert run(copied_run, resume=True).state.global_step == MAX_STEPS


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a\\b"])
def test_a_marker_that_points_outside_is_refused(name: str, copied_run: Path) -> None:
    path = copied_run / "checkpoint-8" / MARKER
    path.write_text(json.dumps({"version": 1, "step": 8, "files": {name: 3}}))
    assert "outside of the checkpoint" in str(examine(path.parent).problem)


def test_a_run_that_had_ended_takes_no_step_more(copied_run: Path) -> None:
    weights = load_file(copied_run / "checkpoint-8" / "model.safetensors")
    trainer = run(copied_run, resume=True)
    assert trainer.state.global_step == MAX_STEPS
    now = weights_of(trainer.model)
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.items())
    assert checkpoints_in(copied_run) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


class EndlessRows(IterableDataset):
    """Rows without a length: a pass has five batches."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from token_rows(20)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("saved", [2, 5, 7])
def test_a_resume_finds_its_place_in_data_without_a_length(
    saved: int, accumulated: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "rows": EndlessRows(),
        "gradient_accumulation_steps": accumulated,
        "lr_scheduler_type": "constant",
        "save_steps": saved,
    }
    whole = run(tmp_path / "whole", max_steps=12, **options)
    run(tmp_path / "parts", max_steps=saved, **options)  # max_steps differs from the resumed run's
    resumed = run(tmp_path / "parts", max_steps=12, **options, resume=True)
    assert list(differences(weights_of(whole.model), weights_of(resumed.model), "model")) == []


# ---- another model, another backend, another run ----


def freeze(model: Any) -> Any:
    model.transformer.wpe.requires_grad_(False)
    return model


OTHER_MODELS = {"frozen": lambda: freeze(gpt2(1)), "one layer more": lambda: gpt2(2)}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_resume_with_other_parameters_names_the_choices(name: str, copied_run: Path) -> None:
    model = OTHER_MODELS[name]()
    with pytest.raises(StateError, match=r"is of other parameters.*missing_state='fresh'"):
        make_trainer(copied_run, CONFIG, model=model).train(resume_from_checkpoint=True)


def test_a_resume_after_freezing_starts_a_fresh_optimizer_on_request(copied_run: Path) -> None:
    fresh = RecoveryConfig(missing_state="fresh")
    trainer = make_trainer(copied_run, CONFIG, model=freeze(gpt2(1)), recovery=fresh, max_steps=10)
    trainer.add_callback(rates := Rates())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert not rates.has_state


def test_a_larger_model_is_not_resumed_with_untrained_layers(copied_run: Path) -> None:
    fresh = RecoveryConfig(missing_state="fresh")
    with pytest.raises(StateError, match="was saved from a different model"):
        make_trainer(copied_run, CONFIG, model=gpt2(2), recovery=fresh).train(
            resume_from_checkpoint=True
        )


def test_a_deepspeed_checkpoint_is_not_resumed_without_deepspeed(copied_run: Path) -> None:
    make_deepspeed(copied_run / "checkpoint-8")
    with pytest.raises(StateError, match=r"saved under DeepSpeed.*missing_state='fresh'"):
        run(copied_run, resume=True, max_steps=10)
    trainer = make_trainer(
        copied_run, CONFIG, recovery=RecoveryConfig(missing_state="fresh"), max_steps=10
    )
    trainer.add_callback(rates := Rates())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert not rates.has_state


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(copied_run: Path) -> None:
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        with locked(copied_run):
            worker = os.fork()  # as a worker of a data loader does, it outlives the killed run
            if worker:
                os.write(write, str(worker).encode())
            signal.pause()
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(
            ConfigurationError, match=rf"process {first} on .* different output_dir"
        ):
            run(copied_run, max_steps=2)
        assert run(copied_run, max_steps=2, save_strategy="no").state.global_step == 2
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        first = 0
        assert (copied_run / LOCK).exists()
        assert run(copied_run, max_steps=10, resume=True).state.global_step == 10
        assert not (copied_run / LOCK).exists()
    finally:
        for child in filter(None, (first, worker)):
            os.kill(child, signal.SIGKILL)


# ---- a save that fails ----


@pytest.fixture(params=[4096, 30000], ids=["weights", "optimizer"])
def _small_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file may be longer than this, as on a disk that fills up in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("_small_files")
def test_a_full_disk_ends_the_save_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, save_steps=4)
    assert trainer.state.global_step == MAX_STEPS
    assert checkpoints_in(tmp_path) == []
    assert not (tmp_path / STAGING).exists()
    said = [r for r in caplog.records if "could not be written" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.WARNING] * 2


BEST: dict[str, Any] = {
    "eval_rows": token_rows(4),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


class Scores(TrainerCallback):
    """Says what an evaluation is to find, by step: the Trainer looks at it after this."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses
        self.steps: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        kwargs["metrics"]["eval_loss"] = self.losses[state.global_step]


class FailsIn(PSSTrainer):
    """One of the parts of a save finds the disk full."""

    method = ""
    steps: tuple[int, ...] = (5, 6, 7, 8)

    def _fail(self, method: str) -> None:
        if method == self.method and self.state.global_step in self.steps:
            raise OSError(28, "No space left on device")

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)
        self._fail("save_model")

    def _save_optimizer_and_scheduler(self, *args: Any) -> None:
        super()._save_optimizer_and_scheduler(*args)
        self._fail("_save_optimizer_and_scheduler")

    def _save_rng_state(self, *args: Any) -> None:
        super()._save_rng_state(*args)
        self._fail("_save_rng_state")

    def _publish(self, *args: Any) -> None:
        self._fail("_publish")
        super()._publish(*args)


@pytest.mark.parametrize(
    "method", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
)
def test_a_save_that_fails_half_way_leaves_the_last_one_alone(method: str, tmp_path: Path) -> None:
    cls = type("Fails", (FailsIn,), {"method": method})
    run(tmp_path, trainer_class=cls, save_steps=MIDDLE, save_total_limit=1)
    assert checkpoints_in(tmp_path) == ["checkpoint-4"]
    assert examine(tmp_path / "checkpoint-4").is_whole
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("method", ["save_model", "_publish"])
def test_a_best_step_that_could_not_be_saved_is_not_the_best(method: str, tmp_path: Path) -> None:
    """The one before stays the best: rotation keeps it, and the Trainer loads it at the end."""
    cls = type("Fails", (FailsIn,), {"method": method, "steps": (6,)})
    trainer = make_trainer(tmp_path, CONFIG, trainer_class=cls, **BEST, save_total_limit=1)
    trainer.add_callback(Scores({2: 3.0, 4: 2.0, 6: 1.0, 8: 1.5}))
    trainer.add_callback(saves := Saves())
    trainer.train()
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (1.5, 8)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    assert checkpoints_in(tmp_path) == ["checkpoint-8"]
    assert saves.steps == [2, 4, 8], "on_save is not called for a refused save"


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_best_step_that_is_not_finite_is_not_the_best(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG, **{**BEST, "save_strategy": strategy})
    trainer.add_callback(Scores({2: 3.0, 4: 2.0, 6: 1.0, 8: 1.0}))
    trainer.add_callback(Break(5, a_momentum, math.nan))
    trainer.add_callback(saves := Saves())
    trainer.train()
    assert trainer.state.best_metric == 2.0
    assert saves.steps == [2, 4]


def test_an_older_checkpoint_of_the_same_step_survives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path)
    before = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "checkpoint-8" and self.parent.name == STAGING:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    trainer._save_checkpoint(trainer.model, None)
    assert "could not be written" in caplog.text
    assert examine(tmp_path / "checkpoint-8").is_whole
    after = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert list(differences(before, after)) == []


def test_the_third_save_in_a_row_that_fails_is_said_as_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cls = type("Fails", (FailsIn,), {"method": "save_model", "steps": (2, 3, 5, 6, 7)})
    run(tmp_path, trainer_class=cls, save_steps=1)
    said = [r for r in caplog.records if "could not be written" in r.getMessage()]
    levels = [logging.WARNING] * 4 + [logging.ERROR]
    assert [one.levelno for one in said] == levels
    assert "no save since step 4" in said[-1].getMessage()


@pytest.mark.parametrize("method", ["save_model", "_save_optimizer_and_scheduler", "_publish"])
@pytest.mark.parametrize("gone", [STAGING, ""], ids=["staging", "output_dir"])
def test_a_folder_that_vanishes_during_a_save_ends_no_run(
    method: str, gone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Vanishes(FailsIn):
        def _fail(self, method: str) -> None:
            if method == self.method and self.state.global_step == 4:
                shutil.rmtree(tmp_path / "run" / gone)

    cls = type("Vanishes", (Vanishes,), {"method": method})
    trainer = run(tmp_path / "run", trainer_class=cls, save_steps=2)
    assert trainer.state.global_step == MAX_STEPS
    assert "checkpoint-4 could not be written" in caplog.text
    assert examine(tmp_path / "run" / "checkpoint-8").is_whole


def test_a_copy_for_the_hub_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Trainer, checkpoint_folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", fails)
    trainer = make_trainer(tmp_path, CONFIG, trainer_class=PushSeen)
    trainer.add_callback(saves := Saves())
    trainer.train()
    assert examine(tmp_path / "checkpoint-8").is_whole
    assert saves.steps == [8], "the save itself is there"
    assert "could not be prepared for the Hub" in caplog.text


def test_an_error_that_is_not_of_the_disk_is_not_hidden(tmp_path: Path) -> None:
    class Broken(PSSTrainer):
        def _save_rng_state(self, *args: Any) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        run(tmp_path, trainer_class=Broken)


# ---- signals ----


class Send(TrainerCallback):
    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(
    ("signum", "error"),
    [
        (signal.SIGTERM, SystemExit),
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGHUP, SystemExit),
    ],
)
def test_a_signal_saves_this_step_and_leaves(
    signum: int, error: type[BaseException], tmp_path: Path
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    whole = run(tmp_path / "whole")
    trainer = make_trainer(tmp_path / "cut", CONFIG)
    trainer.add_callback(Send(signum, 3))
    with pytest.raises(error) as raised:
        trainer.train()
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 128 + signum
    assert checkpoints_in(tmp_path / "cut") == ["checkpoint-3"]
    assert [
        signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    ] == before
    resumed = run(tmp_path / "cut", resume=True)
    assert differences_at_the_end(whole, resumed) == []


def stop_at(step: int, trainer: Trainer) -> None:
    trainer.add_callback(Send(signal.SIGTERM, step))
    with pytest.raises(SystemExit):
        trainer.train()


def test_a_signal_saves_the_averaged_weights_as_any_save_does(tmp_path: Path) -> None:
    options = {"trainer_class": PSSTrainer, "pss_optim": "amuse"}
    train(tmp_path / "whole", save_steps=3, **options)
    trainer = make_trainer(tmp_path / "cut", save_steps=4, **options)
    assert schedule_free(trainer.create_optimizer()) is not None
    stop_at(3, trainer)
    folders = [tmp_path / name / "checkpoint-3" for name in ("whole", "cut")]
    assert checkpoint_differences(*folders) == []


def test_a_checkpoint_saved_on_a_signal_is_not_removed_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG, **BEST, save_total_limit=1)
    trainer.add_callback(Scores({2: 1.0, 4: 2.0}))
    stop_at(5, trainer)
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert newest_whole(tmp_path).path.name == "checkpoint-5"


@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_a_signal_saves_at_the_step_of_an_evaluation_and_does_not_evaluate(
    strategy: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, CONFIG, **{**BEST, "save_strategy": strategy})
    trainer.add_callback(scores := Scores({2: 1.0, 4: 2.0}))
    stop_at(4, trainer)
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert scores.steps == [2]


def test_a_signal_saves_once_where_epochs_are_saved(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        CONFIG,
        eval_rows=token_rows(4),
        max_steps=-1,
        num_train_epochs=1,
        save_strategy="epoch",
        eval_strategy="epoch",
    )
    trainer.add_callback(scores := Scores({}))
    trainer.add_callback(saves := Saves())
    stop_at(3, trainer)
    assert (saves.steps, scores.steps) == ([3], [])


def test_a_signal_is_agreed_upon_once_more_at_the_end(tmp_path: Path) -> None:
    """The other of two ranks got the signal after the ranks last agreed."""

    class Other(PSSTrainer):
        def _largest_of_ranks(self, number: int) -> int:
            has_ended = self.state.global_step == MAX_STEPS and not self.is_in_train
            return signal.SIGTERM if has_ended else super()._largest_of_ranks(number)

    with pytest.raises(SystemExit):
        run(tmp_path, trainer_class=Other)


def test_a_signal_during_an_evaluation_saves_without_waiting_for_its_end(tmp_path: Path) -> None:
    class Counts(PSSTrainer):
        num_predicted = 0

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.num_predicted == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            result = super().prediction_step(*args, **kwargs)
            self.num_predicted += 1
            return result

    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    options["eval_rows"] = token_rows(4)
    trainer = make_trainer(tmp_path / "cut", CONFIG, trainer_class=Counts, **options)
    trainer.add_callback(saves := Saves())
    with pytest.raises(SystemExit):
        trainer.train()
    assert (trainer.num_predicted, saves.steps) == (1, [2])
    ends = [run(tmp_path / "whole", **options), run(tmp_path / "cut", resume=True, **options)]
    assert list(differences(*(weights_of(end.model) for end in ends))) == []


def test_the_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "_ONE_REQUEST_SECONDS", 0.0)
    trainer = make_trainer(tmp_path, CONFIG)
    trainer.add_callback(Send(signal.SIGINT, 3))
    trainer.add_callback(Send(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints_in(tmp_path) == []
    assert trainer.state.global_step == 2


def test_a_run_that_saves_nothing_leaves_signals_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIG, save_strategy="no")
    trainer.add_callback(Send(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
