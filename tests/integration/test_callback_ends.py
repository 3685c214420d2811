"""How a run ends, well or not: what is told, what is finished, and what is taken away again."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import controller_of, events_of, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer, TrainerCallback

from hf_pss import NonFiniteError, PSSCallback, PSSConfig, RecoveryConfig
from hf_pss.errors import TrainingFailedError

STEP = 9
OPTIONS: dict[str, Any] = {"max_steps": 14, "save_steps": 2}
BACK: dict[str, Any] = {"max_nonfinite_streak": 3}
ROLLBACK = RecoveryConfig(on_failure="rollback", failure_window_steps=4, max_failed_interventions=2)
SHARP: dict[str, Any] = {
    "threshold_ratio": 3.0,
    "calibration_steps": 2,
    "cooldown_steps": 0,
}


class Ends(TrainerCallback):
    """Counts how often a run was said to be over."""

    times = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times += 1


def scale(trainer: Trainer, factor: float, *, steps: range) -> None:
    """Scale the gradients of these steps, which are passed over once the run has gone back."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient * factor if trainer.state.global_step + 1 in steps else gradient

    for parameter in trainer.model.parameters():
        parameter.register_hook(hook)


def num_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def texts(folder: Path) -> dict[str, list[str]]:
    """Return what TensorBoard has by tag."""
    found = EventAccumulator(str(next((folder / "runs").iterdir()))).Reload()
    return {
        tag: [text.decode() for e in found.Tensors(tag) for text in e.tensor_proto.string_val]
        for tag in found.Tags()["tensors"]
    }


# ---- going back is no end ----


def test_going_back_is_no_end_to_anybody(tmp_path: Path) -> None:
    """Trackers stay open and hear of it; the alert was never sent once they were finished."""
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper", **SHARP),
        recovery=ROLLBACK,
        report_to="tensorboard",
        **OPTIONS,
    )
    scale(trainer, 100.0, steps=range(STEP, STEP + 3))
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    assert [e["decision"] for e in events_of(tmp_path) if e["kind"] == "failure"] == ["roll_back"]
    assert ends.times == 1
    assert sum("train_runtime" in line for line in trainer.state.log_history) == 1
    said = [text for many in texts(tmp_path).values() for text in many]
    assert any("back to checkpoint-8" in text for text in said)


@pytest.fixture
def _restored_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_restored_state")
def test_a_loss_scaler_is_ready_for_the_step_after_going_back(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, PSSConfig.preset("paper", **BACK), recovery=ROLLBACK, **OPTIONS
    )
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale(trainer, math.inf, steps=range(STEP, STEP + 3))
    trainer.train()
    assert trainer.state.global_step == 14


# ---- what is taken away ----


@pytest.mark.parametrize("on_failure", ["smooth", "rollback"])
def test_no_hook_outlives_a_run_that_pss_ends(on_failure: str, tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", **BACK, health="full", health_every_steps=STEP + 2)
    recovery = replace(ROLLBACK, on_failure=on_failure)
    trainer = make_trainer(tmp_path, config, recovery=recovery, neftune_noise_alpha=5.0, **OPTIONS)
    scale(trainer, math.nan, steps=range(STEP, STEP + 3))
    attention = AttentionInterface.get_interface
    if on_failure == "smooth":
        with pytest.raises(NonFiniteError):
            trainer.train()
    else:
        trainer.train()
    assert num_hooks(trainer.model) == 0
    assert AttentionInterface.get_interface is attention
    assert not trainer.is_in_train


def test_no_hook_outlives_a_run_that_anything_ends(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ValueError("anything")

    config = PSSConfig.preset("paper", health="full", health_every_steps=1)
    trainer = make_trainer(tmp_path, config, neftune_noise_alpha=5.0, **OPTIONS)
    trainer.callback_handler.callbacks.insert(0, Fails())
    with pytest.raises(ValueError, match="anything"):
        trainer.train()
    assert num_hooks(trainer.model) == 0


# ---- what is told ----


def test_a_run_that_pss_stops_is_told_and_finished_as_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_pss")
    config = PSSConfig.preset("paper", on_nonfinite="stop", health="light", health_every_steps=2)
    trainer = make_trainer(tmp_path, config, report_to="tensorboard", **OPTIONS)
    poisoned = [STEP]
    for parameter in trainer.model.parameters():
        parameter.register_hook(
            lambda g: g * math.nan if trainer.state.global_step + 1 in poisoned else g
        )
    with pytest.raises(NonFiniteError):
        trainer.train()
    told = [record.message for record in caplog.records]
    assert sum(text.startswith("PSS: 0 interventions") for text in told) == 1
    listener: Any = PSSCallback.of(trainer)
    assert listener.health_summary in told
    assert any("table" in tag for tag in texts(tmp_path))
    # And the next session has trackers of its own.
    poisoned.clear()
    caplog.clear()
    trainer.train()
    assert "stops reporting" not in caplog.text


def test_a_run_that_has_failed_is_told_and_finished_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_pss")
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper", **SHARP),
        recovery=replace(ROLLBACK, on_failure="stop"),
        **OPTIONS,
    )
    scale(trainer, 100.0, steps=range(STEP, STEP + 3))
    with pytest.raises(TrainingFailedError):
        trainer.train()
    told = [record.message for record in caplog.records]
    assert sum(text.startswith("PSS: 3 interventions") for text in told) == 1


# ---- what is resumed ----


def test_health_begins_anew_where_the_baseline_does(tmp_path: Path) -> None:
    """Steps after the state's were trained without PSS: of neither is the history whole."""
    config = PSSConfig.preset("paper", health="light", health_every_steps=1)
    make_trainer(tmp_path, config, **{**OPTIONS, "max_steps": 4}).train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["PSSCallback"]["attributes"]["saved_state"]["step"] = 3
    path.write_text(json.dumps(state))

    class Looks(TrainerCallback):
        found: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = controller_of(trainer).health.state()

    states = []
    for resume in (None, str(path.parent)):
        trainer = make_trainer(tmp_path / f"{resume is None}", config, **OPTIONS)
        looks = Looks()
        trainer.add_callback(looks)
        trainer.train(resume_from_checkpoint=resume)
        states.append(looks.found)
    assert states[0] == states[1]
