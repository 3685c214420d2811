"""Where interventions fail: back to a healthy checkpoint and on behind the batches, or stop."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EAGER,
    checkpoint_differences,
    differences,
    events_of,
    make_trainer,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_pss import NonFiniteError, PSSConfig
from hf_pss.errors import TrainingFailedError
from hf_pss.integration.checkpoints.judge import examine

SPIKE = 9
STEPS = {"max_steps": 16, "save_steps": 2, "lr_scheduler_type": "linear"}
# The norm of a healthy step of these runs is within 0.9 and 1.3.
SHARP = {"threshold_ratio": 3.0, "calibration_steps": 2, "cooldown_steps": 0}
QUICK = {"on_failure": "rollback", "failure_window_steps": 4, "max_failed_interventions": 2}


def surviving(
    folder: Path, pss: PSSConfig, *, survival: dict[str, Any] | None = None, **more: Any
) -> Trainer:
    config = replace(pss, **{**QUICK, **(survival or {})})
    return make_trainer(folder, config, **{**STEPS, **more})


class Seen(TrainerCallback):
    """Notes the rate and the rows of every step, and the weights that a session began with."""

    def __init__(self) -> None:
        self.rates: list[tuple[int, float]] = []
        self.rows: list[tuple[int, bytes]] = []
        self.began: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append((state.global_step, weights_of(kwargs["model"])))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append((state.global_step + 1, kwargs["optimizer"].param_groups[0]["lr"]))


def watch_rows(trainer: Trainer, seen: Seen) -> None:
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = inputs["input_ids"].numpy().tobytes()
        seen.rows.append((trainer.state.global_step + 1, rows))
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


def spike(trainer: Trainer, factor: float, *, steps: range, once: bool = True) -> None:
    """Scale the gradients of these steps; with `once`, only the first time they are reached."""
    done: set[int] = set()

    def hook(gradient: Tensor) -> Tensor:
        step = trainer.state.global_step + 1
        if step not in steps or (once and step in done):
            return gradient
        return gradient * factor

    for parameter in trainer.model.parameters():
        parameter.register_hook(hook)


def failures_of(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(folder) if event["kind"] == "failure"]


def test_the_run_goes_back_and_on_behind_the_batches_that_led_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain_seen, seen = Seen(), Seen()
    plain = make_trainer(tmp_path / "plain", **STEPS)
    watch_rows(plain, plain_seen)
    plain.add_callback(plain_seen)
    plain.train()
    trainer = surviving(tmp_path / "run", PSSConfig(**SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    watch_rows(trainer, seen)
    trainer.add_callback(seen)
    trainer.train()
    assert trainer.state.global_step == 16
    (event,) = failures_of(tmp_path / "run")
    # The first intervention is at the spike; the two after it fail.
    assert (event["step"], event["decision"]) == (SPIKE + 2, "roll_back")
    assert "back to checkpoint-8, batches of steps 9 to 11 skipped" in event["reason"]
    assert event["reason"] in caplog.text
    # Weights are the checkpoint's; step, rate and rows are those of the twelfth step.
    (_, _), (step, weights) = seen.began
    assert step == SPIKE + 2
    saved = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
    after = [pair for pair in seen.rates if pair[0] > SPIKE + 2]
    assert after == [pair for pair in plain_seen.rates if pair[0] > SPIKE + 2]
    rows, plain_rows = seen.rows[-len(after) :], plain_seen.rows[-len(after) :]
    assert rows == plain_rows
    assert "fresh baseline" not in caplog.text
    assert (tmp_path / "run" / "_pss_abandoned" / "checkpoint-10").is_dir()
    assert examine(tmp_path / "run" / "checkpoint-16").is_whole


def test_a_run_that_went_back_is_resumed_exactly(tmp_path: Path) -> None:
    trainer = surviving(tmp_path / "run", PSSConfig(**SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    again = surviving(tmp_path / "again", PSSConfig(**SHARP))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-14"))
    ends = [tmp_path / name / "checkpoint-16" for name in ("run", "again")]
    assert checkpoint_differences(*ends) == []
    assert list(differences(weights_of(trainer.model), weights_of(again.model))) == []


def test_one_intervention_that_helps_is_no_failure(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig(**SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 1))
    trainer.train()
    assert [event["step"] for event in events_of(tmp_path)] == [SPIKE]
    assert failures_of(tmp_path) == []


def test_it_goes_back_so_often_and_then_stops(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, EAGER, survival={"max_rollbacks": 1}, max_steps=60)
    with pytest.raises(TrainingFailedError, match="after 1 of at most 1 rollbacks"):
        trainer.train()
    decisions = [event["decision"] for event in failures_of(tmp_path)]
    assert decisions[-2:] == ["roll_back", "stop"]


def test_stop_saves_nothing_and_names_the_checkpoint(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig(**SHARP), survival={"on_failure": "stop"}, save_steps=1)
    spike(trainer, 100.0, steps=range(SPIKE, 17))
    with pytest.raises(TrainingFailedError, match=r"Stopped at step 11: .*resume from .*point-8,"):
        trainer.train()
    assert not (tmp_path / "checkpoint-11").exists()
    (event,) = failures_of(tmp_path)
    assert (event["step"], event["decision"]) == (11, "stop")


def test_smooth_goes_on_as_ever(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, EAGER, survival={"on_failure": "smooth"})
    trainer.train()
    assert trainer.state.global_step == 16
    assert failures_of(tmp_path) == []


def test_without_a_checkpoint_to_go_back_to_smoothing_goes_on(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, EAGER, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 16
    assert {event["decision"] for event in failures_of(tmp_path)} == {"observe"}


def test_a_streak_that_is_not_finite_goes_back_to_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = surviving(tmp_path, PSSConfig(max_nonfinite_streak=3))
    spike(trainer, math.nan, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert trainer.state.global_step == 16
    (event,) = failures_of(tmp_path)
    assert (event["step"], event["decision"]) == (SPIKE + 2, "roll_back")
    assert "back to checkpoint-8" in event["reason"]
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_weights_that_broke_are_the_checkpoints_again(tmp_path: Path) -> None:
    """Nothing but going back can mend a NaN in a weight."""
    trainer = surviving(tmp_path, PSSConfig(max_nonfinite_streak=3), save_total_limit=1)

    class Break(TrainerCallback):
        is_done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SPIKE and not self.is_done:
                self.is_done = True
                with torch.no_grad():
                    kwargs["model"].transformer.wte.weight[0, 0] = math.nan

    trainer.add_callback(Break())
    trainer.train()
    assert trainer.state.global_step == 16
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert examine(tmp_path / "checkpoint-16").is_whole


def test_without_a_checkpoint_a_streak_is_the_error_that_it_was(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig(max_nonfinite_streak=3), save_strategy="no")
    spike(trainer, math.nan, steps=range(3, 17), once=False)
    with pytest.raises(NonFiniteError, match="3 non-finite steps in a row"):
        trainer.train()


def test_a_failure_at_the_end_leaves_the_checkpoints_weights(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig(**SHARP))
    spike(trainer, 100.0, steps=range(14, 17))
    trainer.train()
    assert trainer.state.global_step == 16
    (event,) = failures_of(tmp_path)
    assert event["step"] == 16
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    weights = weights_of(trainer.model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def test_what_one_went_back_to_and_failed_at_once_is_not_taken_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = surviving(tmp_path, PSSConfig(**SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 6))
    caplog.set_level(logging.WARNING)
    trainer.train()
    reasons = [event["reason"] for event in failures_of(tmp_path)]
    assert ["back to checkpoint-8" in reasons[0], "back to checkpoint-6" in reasons[1]] == [1, 1]


@pytest.mark.parametrize("where", ["momentum", "buffer"])
def test_a_state_that_could_not_be_saved_any_more_goes_back(where: str, tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig())
    trainer.model.transformer.register_buffer("running", torch.zeros(3))

    class Break(TrainerCallback):
        is_done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 10 or self.is_done:
                return
            self.is_done = True
            weight = kwargs["model"].transformer.wte.weight
            buffer = kwargs["model"].transformer.running
            state = kwargs["optimizer"].state[weight]["exp_avg"]
            (buffer if where == "buffer" else state).view(-1)[0] = math.nan

    trainer.add_callback(Break())
    trainer.train()
    unsaved, back = events_of(tmp_path)
    assert (unsaved["step"], unsaved["kind"], unsaved["reason"]) == (10, "non_finite", "not saved")
    assert (back["step"], back["decision"]) == (10, "roll_back")
    assert "back to checkpoint-8" in back["reason"]
    assert examine(tmp_path / "checkpoint-16").is_whole
