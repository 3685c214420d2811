"""AMUSE in a Trainer: evaluated and saved is the average, and a resume goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EAGER,
    differences,
    gpt2,
    history,
    make_trainer,
    run_differences,
    token_rows,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_pss import PSSConfig
from hf_pss.optim.amuse import Amuse
from hf_pss.trainer.schedule_free import ScheduleFreeCallback, schedule_free

# x found again from y and the checkpoint's z, against its weights; 9.4e-10 measured.
ROUND_TRIP = 2e-9


def amuse(model: nn.Module, **options: Any) -> Amuse:
    """Its groups by shape: enough for what is tested here."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    groups = [{"params": matrices, "algo": "muon"}, {"params": others, "algo": "adamw"}]
    return Amuse(groups, beta1=0.8, warmup_steps=2, **options)


def amuse_trainer(folder: Path, pss: PSSConfig | None = None, **options: Any) -> Trainer:
    defaults = {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "save_steps": 4,
        "learning_rate": 0.02,
    }
    trainer = make_trainer(folder, pss, **{**defaults, **options})
    trainer.optimizer_cls_and_kwargs = (lambda: amuse, {"lr": 0.02})
    if pss is None:
        trainer.add_callback(ScheduleFreeCallback())
    return trainer


def inner(trainer: Trainer) -> Amuse:
    found = schedule_free(trainer.optimizer)
    assert isinstance(found, Amuse)
    return found


class Watcher(TrainerCallback):
    """Notes what the model holds at a save and at a prediction."""

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, Tensor]] = {}
        self.predicted: list[dict[str, Tensor]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = weights_of(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.predicted.append(weights_of(kwargs["model"]))


def averages(model: nn.Module, optimizer: Amuse) -> dict[str, Tensor]:
    """Return x by name, of a model that holds it."""
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pss", [None, EAGER], ids=["plain", "pss"])
def test_checkpoints_hold_the_average_without_an_evaluation(
    tmp_path: Path, pss: PSSConfig | None
) -> None:
    trainer = amuse_trainer(tmp_path, pss)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert not any(group["train_mode"] for group in state["param_groups"])
    # Loaded into a fresh model, the state and the weights give back y, and x from it.
    model = gpt2()
    model.load_state_dict(saved, strict=False)
    optimizer = amuse(model)
    optimizer.load_state_dict(state)
    x = averages(model, optimizer)
    optimizer.train()
    y = {name: p.detach().clone() for name, p in model.named_parameters()}
    distance = max((y[name] - x[name]).abs().max() for name in x)
    optimizer.eval()
    error = max((p - x[name]).abs().max() for name, p in model.named_parameters())
    assert error <= ROUND_TRIP < 100 * ROUND_TRIP < distance


@pytest.mark.parametrize("pss", [None, EAGER], ids=["plain", "pss"])
def test_a_resume_is_exact(tmp_path: Path, pss: PSSConfig | None) -> None:
    whole = amuse_trainer(tmp_path / "whole", pss)
    whole.train()
    resumed = amuse_trainer(tmp_path / "resumed", pss, model=gpt2())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    # The closing line's train_loss counts only the steps since the resume: the Trainer's own way.
    found = run_differences(whole, resumed)
    assert [line for line in found if "train_loss" not in line] == []


def test_an_evaluation_at_the_step_of_a_save_sees_the_same_weights(tmp_path: Path) -> None:
    trainer = amuse_trainer(
        tmp_path, eval_strategy="steps", eval_steps=4, eval_rows=token_rows(8), save_steps=4
    )
    watcher = Watcher()
    trainer.add_callback(watcher)
    trainer.train()
    assert len(watcher.predicted) == len(watcher.saved) == 2
    for seen, saved in zip(watcher.predicted, watcher.saved.values(), strict=True):
        assert list(differences(seen, saved)) == []


def test_training_ends_with_the_average_in_the_model(tmp_path: Path) -> None:
    trainer = amuse_trainer(tmp_path, save_strategy="no")
    trainer.train()
    assert not any(group["train_mode"] for group in inner(trainer).param_groups)
    before = weights_of(trainer.model)
    trainer.predict(token_rows(8))
    assert list(differences(before, weights_of(trainer.model))) == []


def test_the_best_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    trainer = amuse_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        eval_rows=token_rows(8),
        load_best_model_at_end=True,
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    now = weights_of(trainer.model)
    assert list(differences(best, {name: now[name] for name in best})) == []


def test_epochs_end_with_the_average(tmp_path: Path) -> None:
    trainer = amuse_trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="epoch", rows=token_rows(16)
    )
    watcher = Watcher()
    trainer.add_callback(watcher)
    trainer.train()
    assert sorted(watcher.saved) == [4, 8]
    for step in watcher.saved:
        path = tmp_path / f"checkpoint-{step}" / "optimizer.pt"
        groups = torch.load(path, weights_only=True)["param_groups"]
        assert not any(group["train_mode"] for group in groups)


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    switched = make_trainer(tmp_path / "switched")
    switched.add_callback(ScheduleFreeCallback())
    switched.train()
    assert schedule_free(switched.optimizer) is None
    assert run_differences(plain, switched) == []


def test_a_smoothed_run_learns(tmp_path: Path) -> None:
    trainer = amuse_trainer(tmp_path, EAGER)
    trainer.train()
    losses = [line["loss"] for line in history(trainer) if "loss" in line]
    assert losses[-1] < losses[0]
