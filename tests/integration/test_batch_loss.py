"""The loss that an intervention is tried on: the trainer's own, of a sound step, traceless."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    MODELS,
    arguments,
    controller_of,
    events_of,
    gpt2,
    make_trainer,
    token_rows,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_pss import PSSCallback, PSSConfig, PSSTrainer
from hf_pss.trainer.batch_loss import BatchLoss


class OneBatch(Trainer):
    """Stops before any update, so that the loss of its batch can be computed again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_loss = BatchLoss(self)
        self.seen: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.batch_loss.listening():
            loss = super().training_step(*args, **kwargs)
        self.seen.append(loss)
        return loss


def trained(folder: Path, model: Any, **options: Any) -> OneBatch:
    trainer = OneBatch(
        model=model,
        args=arguments(folder, max_steps=1, learning_rate=0.0, save_strategy="no", **options),
        train_dataset=token_rows(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loss_that_was_trained_on(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = trained(tmp_path, model)
    loss = trainer.batch_loss(is_sound=True)
    assert loss is not None
    assert float(loss) == pytest.approx(float(trainer.seen[0]), rel=1e-6)


def test_nothing_is_changed(tmp_path: Path) -> None:
    """Random states, modes, buffers and gradients are as they were, though dropout is on."""
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.5)
    trainer = trained(tmp_path, model)
    model.transformer.h[0].mlp.eval()  # a frozen part's mode is its own
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, second = trainer.batch_loss(is_sound=True), trainer.batch_loss(is_sound=True)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second), "the same loss for the same weights"
    assert not first.requires_grad
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "compute_loss" not in vars(trainer)


def test_before_a_first_batch_there_is_none(tmp_path: Path) -> None:
    trainer = OneBatch(model=gpt2(), args=arguments(tmp_path), train_dataset=token_rows())
    assert trainer.batch_loss(is_sound=True) is None


class OddBatch(PSSTrainer):
    """Step 5 has a loss that is 1,000 times too large."""

    calls: list[tuple[int, bool, float]]

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        odd = model.training and self.state.global_step == 4
        self.calls.append(
            (self.state.global_step, model.training, float(inputs["input_ids"].sum()))
        )
        return 1000.0 * loss if odd else loss


def test_a_spike_is_tried_on_the_batch_before_it(tmp_path: Path) -> None:
    """A batch of nonsense prefers ruined weights: it must not be the judge."""
    OddBatch.calls = []
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper", trial="spikes", threshold_ratio=2.0, calibration_steps=2),
        trainer_class=OddBatch,
        rows=token_rows(),
        save_strategy="no",
    )
    trainer.train()
    trained_on = {step: batch for step, training, batch in OddBatch.calls if training}
    tried = [(step, batch) for step, training, batch in OddBatch.calls if not training]
    # In the fifth step, whose number is still 4 while it is trained on.
    assert tried == [(5, trained_on[3])] * 2
    assert trained_on[3] != trained_on[4]


class WithMetrics(PSSTrainer):
    """Collects a metric whenever a loss is computed, as trl's trainers do."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        metrics = self.__dict__.setdefault("_metrics", {"train": [], "eval": []})
        metrics["train" if model.training else "eval"].append(1.0)
        labels = inputs.pop("labels")  # some trainers take them out
        return super().compute_loss(model, {**inputs, "labels": labels}, **kwargs)


def test_metrics_count_what_was_trained_on_and_nothing_else(tmp_path: Path) -> None:
    config = PSSConfig.preset(
        "paper", trial="spikes", threshold_ratio=1.0001, calibration_steps=1, cooldown_steps=0
    )
    trainer = make_trainer(
        tmp_path, config, trainer_class=WithMetrics, rows=token_rows(), save_strategy="no"
    )
    trainer.train()
    assert controller_of(trainer)._history.num_interventions > 0
    assert trainer._metrics == {"train": [1.0] * 8, "eval": []}


def test_a_run_that_tries_nothing_remembers_no_batch(tmp_path: Path) -> None:
    for config in (
        PSSConfig.preset("paper"),
        PSSConfig.preset("floor"),
        PSSConfig(observe_only=True),
    ):
        trainer = make_trainer(tmp_path, config, rows=token_rows(), max_steps=1)
        trainer.train()
        assert PSSCallback.of(trainer).batch_loss is None


def test_a_callback_in_a_second_trainer_forgets_the_first_ones_batch(tmp_path: Path) -> None:
    """Judged on the first trainer's model, no edit of the second's could ever raise a loss."""
    config = PSSConfig.preset(
        "paper", trial="spikes", threshold_ratio=1.0001, calibration_steps=1, cooldown_steps=0
    )
    callback = PSSCallback(config)
    for name in ("first", "second"):
        args = arguments(tmp_path / name, save_strategy="no")
        trainer = Trainer(model=gpt2(), args=args, train_dataset=token_rows())
        callback.attach(trainer)
        trainer.train()
        assert callback.batch_loss is None, "a run that is over holds neither batch nor model"
        records = [r for r in events_of(tmp_path / name) if r.get("loss_before") is not None]
        assert records
        assert all(r["loss_before"] != r["loss_after"] for r in records)


class Masking(PSSTrainer):
    """Replaces tokens of the batch in place, as masking on the fly does."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        inputs["input_ids"][:, ::3] = 0
        inputs["labels"].add_(1).remainder_(5)
        return super().compute_loss(model, inputs, **kwargs)


def test_a_loss_that_changes_its_batch_in_place_is_the_same_twice(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper", trial="spikes", threshold_ratio=1e9),
        trainer_class=Masking,
        rows=token_rows(),
        save_strategy="no",
    )
    losses: list[float] = []

    class Twice(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            batch_loss = PSSCallback.of(trainer).batch_loss
            assert batch_loss is not None
            losses.extend(float(batch_loss(is_sound=False) or 0.0) for _ in range(2))

    trainer.add_callback(Twice())
    trainer.train()
    assert losses[::2] == losses[1::2]
    assert losses[2] > 0
