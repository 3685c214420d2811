"""NaN and inf in the middle of a Trainer's run: skipped or stopped, and never hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EAGER, differences, events_of, history, make_trainer, token_rows, weights_of
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_pss import NonFiniteError, PSSConfig, PSSTrainer

STEP = 4
POISONED = "transformer.h.0.mlp.c_fc.weight"
STEPS = {"max_steps": 12, "save_strategy": "no", "learning_rate": 1e-2}


def poison(trainer: Trainer, value: float, *, at: Callable[[int], bool]) -> None:
    """Put one bad number into one gradient at the given steps, counted from 1."""

    def hook(gradient: Tensor) -> Tensor:
        if at(trainer.state.global_step + 1):
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    trainer.model.get_parameter(POISONED).register_hook(hook)


def is_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


class Snapshots(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = weights_of(kwargs["model"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_bad_gradient_is_skipped_and_the_run_learns_on(
    bad: float, max_grad_norm: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, PSSConfig.preset("paper"), max_grad_norm=max_grad_norm, **STEPS
    )
    poison(trainer, bad, at=lambda step: step in (STEP, STEP + 1))
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    assert is_finite(trainer.model)
    before, after = (snapshots.weights[step] for step in (STEP - 1, STEP + 1))
    assert all(torch.equal(before[name], after[name]) for name in before)
    log = trainer.state.log_history[:-1]
    counts = [line["pss/nonfinite_steps"] for line in log]
    assert counts == [0] * (STEP - 1) + [1] + [2] * (12 - STEP)
    assert sum(line["loss"] for line in log[-3:]) < sum(line["loss"] for line in log[:3])
    first, second = events_of(tmp_path)
    for step, event in ((STEP, first), (STEP + 1, second)):
        found = (event["step"], event["kind"], event["decision"])
        assert found == (step, "non_finite", "skip_update")
        assert event["value"] is None
        assert f"Step {step} is not finite" in caplog.text
    # Clipping by a NaN norm leaves no gradient finite: a run that has had one looks before it.
    assert first["fired"] in ([], [POISONED])
    assert second["fired"] == [POISONED]


def test_the_same_gradient_destroys_the_plain_trainers_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **STEPS)
    poison(trainer, math.nan, at=lambda step: step == STEP)
    trainer.train()
    assert not is_finite(trainer.model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_stop_comes_before_the_update(bad: float, max_grad_norm: float, tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", on_nonfinite="stop")
    trainer = make_trainer(tmp_path, config, max_grad_norm=max_grad_norm, **STEPS)
    poison(trainer, bad, at=lambda step: step == STEP)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    with pytest.raises(NonFiniteError, match=rf"before the update of step {STEP}: .*{POISONED}"):
        trainer.train()
    last = snapshots.weights[STEP - 1]
    assert list(differences(weights_of(trainer.model), last)) == []
    (event,) = events_of(tmp_path)
    assert (event["step"], event["decision"], event["fired"]) == (STEP, "stop", [POISONED])


def test_a_streak_stops_although_the_policy_is_to_skip(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PSSConfig.preset("paper", max_nonfinite_streak=3), **STEPS)
    poison(trainer, math.inf, at=lambda step: step >= STEP)
    with pytest.raises(NonFiniteError, match=r"step 6.*3 non-finite steps in a row"):
        trainer.train()
    assert [event["decision"] for event in events_of(tmp_path)] == ["skip_update"] * 2 + ["stop"]
    assert is_finite(trainer.model)


class BreakAWeight(TrainerCallback):
    """As if an update had overflown: one weight is infinite after it."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP - 1:
            with torch.no_grad():
                kwargs["model"].get_parameter(POISONED)[0, 0] = math.inf


def test_a_weight_that_an_update_broke_stops_after_it_and_is_on_record(tmp_path: Path) -> None:
    config = PSSConfig.preset("floor", floor_ratio=1e-6, check_every_steps=1, on_nonfinite="stop")
    trainer = make_trainer(tmp_path, config, **STEPS)
    trainer.add_callback(BreakAWeight())
    with pytest.raises(NonFiniteError, match=rf"after the update of step {STEP}.*{POISONED}"):
        trainer.train()
    (event,) = events_of(tmp_path)
    assert (event["step"], event["decision"], event["fired"]) == (STEP, "stop", [POISONED])


def test_one_broken_matrix_leaves_the_floor_of_the_others_on(tmp_path: Path) -> None:
    """With the update done there is nothing to skip, and the other matrices are still too hot."""
    config = PSSConfig.preset("floor", floor_ratio=1.3, check_every_steps=STEP)
    trainer = make_trainer(tmp_path, config, **{**STEPS, "max_steps": STEP})
    trainer.add_callback(BreakAWeight())
    trainer.train()
    seen, answered = events_of(tmp_path)
    assert (seen["kind"], seen["decision"], seen["fired"]) == ("non_finite", "observe", [POISONED])
    assert seen["reason"] == "after the update"
    assert (answered["kind"], answered["trigger"]) == ("intervention", "floor")
    names = [matrix["name"] for matrix in answered["matrices"]]
    assert names
    assert POISONED not in names


class NaNLoss(PSSTrainer):
    """Its loss is NaN, and so are its gradients, at one step."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.nan if self.state.global_step == STEP - 1 else loss


def test_a_nan_loss_that_the_trainer_logs_as_zero_is_not_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, EAGER, trainer_class=NaNLoss, **STEPS)
    trainer.train()
    assert history(trainer)[STEP - 1]["loss"] == 0.0  # transformers' logging_nan_inf_filter
    assert trainer.state.log_history[STEP - 1]["pss/nonfinite_steps"] == 1
    (event,) = [e for e in events_of(tmp_path) if e["kind"] == "non_finite"]
    assert (event["step"], event["loss"], event["non_finite"]["loss"]) == (STEP, None, "nan")
    assert f"Step {STEP} is not finite" in caplog.text
    assert is_finite(trainer.model)


class NaNLossOnly(PSSTrainer):
    """Its loss is NaN at one step while its gradients are finite."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + math.nan if self.state.global_step == STEP - 1 else loss


def test_a_nan_loss_with_finite_gradients_counts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PSSConfig.preset("paper"), trainer_class=NaNLossOnly, **STEPS)
    trainer.train()
    (event,) = events_of(tmp_path)
    assert (event["step"], event["detector"], event["decision"]) == (STEP, "loss", "skip_update")


@pytest.mark.parametrize(
    ("trainer_class", "number"), [(NaNLoss, "grad_norm"), (NaNLossOnly, "loss")]
)
def test_a_nan_loss_stops_before_the_update(
    trainer_class: type[PSSTrainer], number: str, tmp_path: Path
) -> None:
    config = PSSConfig.preset("paper", on_nonfinite="stop")
    trainer = make_trainer(tmp_path, config, trainer_class=trainer_class, **STEPS)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    with pytest.raises(NonFiniteError, match=rf"before the update of step {STEP}: {number} = nan"):
        trainer.train()
    last = snapshots.weights[STEP - 1]
    assert list(differences(weights_of(trainer.model), last)) == []
    (event,) = events_of(tmp_path)
    assert (event["step"], event["detector"], event["decision"]) == (STEP, number, "stop")


def test_one_nan_among_micro_batches_is_one_non_finite_step(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, PSSConfig.preset("paper"), gradient_accumulation_steps=3, **STEPS
    )
    calls = iter(range(1000))

    def hook(gradient: Tensor) -> Tensor:
        return gradient * math.nan if next(calls) == 3 * (STEP - 1) + 1 else gradient

    trainer.model.get_parameter(POISONED).register_hook(hook)
    trainer.train()
    (event,) = events_of(tmp_path)
    assert (event["step"], event["decision"]) == (STEP, "skip_update")
    assert is_finite(trainer.model)


def test_a_batch_without_labels_is_noticed(tmp_path: Path) -> None:
    """The mean over no label is 0/0: a NaN loss, whatever the gradients are."""
    rows = token_rows(masked=True)
    for row in rows[::2]:
        row["labels"].fill_(-100)
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper"),
        model_name="bert",
        rows=rows,
        **{**STEPS, "per_device_train_batch_size": 1},
    )
    trainer.train()
    assert {event["kind"] for event in events_of(tmp_path)} == {"non_finite"}
    assert is_finite(trainer.model)


def test_observing_only_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(
        tmp_path, PSSConfig.preset("paper", observe_only=True, on_nonfinite="stop"), **STEPS
    )
    poison(trainer, math.nan, at=lambda step: step == STEP)
    trainer.train()
    assert trainer.state.log_history[-2]["pss/nonfinite_steps"] == 13 - STEP
    assert {event["decision"] for event in events_of(tmp_path)} == {"observe"}


# ---- fp16: the loss scaler's own way of skipping ----


def with_loss_scaler(trainer: Trainer) -> Trainer:
    """Give a CPU trainer what accelerate sets up for fp16 on a GPU: autocast and a scaler."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return trainer


@pytest.fixture
def _restored_state() -> Any:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_restored_state")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_overflows_are_left_to_the_scaler(
    optim: str, max_grad_norm: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PSSConfig.preset("paper", on_nonfinite="stop")  # an overflow is no reason to stop
    trainer = with_loss_scaler(
        make_trainer(tmp_path, config, optim=optim, max_grad_norm=max_grad_norm, **STEPS)
    )
    poison(trainer, math.inf, at=lambda step: step == STEP)
    trainer.train()
    assert is_finite(trainer.model)
    assert trainer.accelerator.scaler.get_scale() == 4.0  # it saw the overflow, and backed off
    assert trainer.state.log_history[-2]["pss/nonfinite_steps"] == 1
    (event,) = events_of(tmp_path)
    assert (event["step"], event["fired"]) == (STEP, [POISONED])
    assert not [r for r in caplog.records if r.name == "hf_pss.controller"]


@pytest.mark.usefixtures("_restored_state")
def test_the_norm_under_a_loss_scaler_is_that_of_the_unscaled_gradient(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", **STEPS)
    plain.train()
    trainer = with_loss_scaler(
        make_trainer(tmp_path / "scaled", PSSConfig.preset("paper"), **STEPS)
    )
    trainer.train()
    scaled, whole = trainer.state.log_history[0], plain.state.log_history[0]
    assert scaled["pss/grad_norm_preclip"] == scaled["grad_norm"]
    # float16 autocast against float32: measured 4.1e-5; still scaled it would be eight times this.
    assert scaled["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("_restored_state")
def test_overflow_for_ever_stops(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", max_nonfinite_streak=3)
    trainer = with_loss_scaler(make_trainer(tmp_path, config, **STEPS))
    poison(trainer, math.inf, at=lambda step: True)
    with pytest.raises(NonFiniteError, match="3 non-finite steps in a row"):
        trainer.train()
