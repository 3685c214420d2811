"""Where interventions fail: back to a healthy checkpoint and on behind the batches, or stop."""

from __future__ import annotations

import json
import logging
import math
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
    token_rows,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import SchedulerType, Trainer, TrainerCallback

from hf_pss import NonFiniteError, PSSConfig, PSSTrainer, RecoveryConfig
from hf_pss.errors import TrainingFailedError
from hf_pss.runs.checkpoint import examine
from hf_pss.runs.folder import checkpoints_by_step

SPIKE = 9
STEPS = {"max_steps": 16, "save_steps": 2, "lr_scheduler_type": "linear"}
# The norm of a healthy step of these runs is within 0.9 and 1.3.
SHARP = {"threshold_ratio": 3.0, "calibration_steps": 2, "cooldown_steps": 0}
QUICK = {"on_failure": "rollback", "failure_window_steps": 4, "max_failed_interventions": 2}


def surviving(
    folder: Path, pss: PSSConfig, *, survival: dict[str, Any] | None = None, **more: Any
) -> Trainer:
    recovery = RecoveryConfig(**{**QUICK, **(survival or {})})
    return make_trainer(folder, pss, recovery=recovery, **{**STEPS, **more})


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
    trainer = surviving(tmp_path / "run", PSSConfig.preset("paper", **SHARP))
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
    trainer = surviving(tmp_path / "run", PSSConfig.preset("paper", **SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    again = surviving(tmp_path / "again", PSSConfig.preset("paper", **SHARP))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-14"))
    ends = [tmp_path / name / "checkpoint-16" for name in ("run", "again")]
    assert checkpoint_differences(*ends) == []
    assert list(differences(weights_of(trainer.model), weights_of(again.model))) == []


def test_one_intervention_that_helps_is_no_failure(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP))
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
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", **SHARP), survival={"on_failure": "stop"}, save_steps=1
    )
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
    trainer = surviving(tmp_path, PSSConfig.preset("paper", max_nonfinite_streak=3))
    spike(trainer, math.nan, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert trainer.state.global_step == 16
    (event,) = failures_of(tmp_path)
    assert (event["step"], event["decision"]) == (SPIKE + 2, "roll_back")
    assert "back to checkpoint-8" in event["reason"]
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_weights_that_broke_are_the_checkpoints_again(tmp_path: Path) -> None:
    """Nothing but going back can mend a NaN in a weight."""
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", max_nonfinite_streak=3), save_total_limit=1
    )

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
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", max_nonfinite_streak=3), save_strategy="no"
    )
    spike(trainer, math.nan, steps=range(3, 17), once=False)
    with pytest.raises(NonFiniteError, match="3 non-finite steps in a row"):
        trainer.train()


def test_a_failure_at_the_end_leaves_the_checkpoints_weights(tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP))
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
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP))
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 6))
    caplog.set_level(logging.WARNING)
    trainer.train()
    reasons = [event["reason"] for event in failures_of(tmp_path)]
    assert ["back to checkpoint-8" in reasons[0], "back to checkpoint-6" in reasons[1]] == [1, 1]


@pytest.mark.parametrize("where", ["momentum", "buffer"])
def test_a_state_that_could_not_be_saved_any_more_goes_back(where: str, tmp_path: Path) -> None:
    trainer = surviving(tmp_path, PSSConfig.preset("paper"))
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


# ---- which checkpoints ----


def names_of(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_by_step(folder)]


@pytest.mark.parametrize(
    ("survival", "named", "abandoned"),
    [
        ({"on_failure": "stop"}, 8, [9, 10]),
        # Back to 8 once, saved there as 11, and failed again: the one before it.
        ({"on_failure": "rollback", "max_rollbacks": 1}, 7, [8, 11, 12, 13]),
    ],
)
def test_where_it_stops_a_resume_finds_what_the_error_names(
    survival: dict[str, Any], named: int, abandoned: list[int], tmp_path: Path
) -> None:
    """What was saved while interventions failed is not the newest any more."""
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", **SHARP), survival=survival, save_steps=1
    )
    spike(trainer, 100.0, steps=range(SPIKE, 17))
    with pytest.raises(TrainingFailedError, match=rf"checkpoint-{named}, .*_pss_abandoned"):
        trainer.train()
    assert names_of(tmp_path)[-1] == f"checkpoint-{named}"
    assert names_of(tmp_path / "_pss_abandoned") == [f"checkpoint-{step}" for step in abandoned]


def test_rotation_spares_the_one_that_the_error_names(tmp_path: Path) -> None:
    options = {"save_steps": 1, "save_total_limit": 1}
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", **SHARP), survival={"on_failure": "stop"}, **options
    )
    spike(trainer, 100.0, steps=range(SPIKE, 17))
    with pytest.raises(TrainingFailedError, match=r"resume from .*checkpoint-8,"):
        trainer.train()


def test_rotation_spares_what_was_before_a_streak(tmp_path: Path) -> None:
    options = {"save_steps": 1, "save_total_limit": 1}
    trainer = surviving(tmp_path, PSSConfig.preset("paper", max_nonfinite_streak=3), **options)
    spike(trainer, math.nan, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert "back to checkpoint-8" in failures_of(tmp_path)[0]["reason"]


def test_checkpoints_of_another_run_are_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, PSSConfig.preset("paper"), max_steps=5, save_steps=5, seed=8).train()
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP), save_steps=4)
    spike(trainer, 100.0, steps=range(6, 9))
    trainer.train()
    assert "back to checkpoint-4" in failures_of(tmp_path)[0]["reason"]
    assert names_of(tmp_path)[:3] == ["checkpoint-4", "checkpoint-5", "checkpoint-8"]


def test_it_goes_back_to_what_it_was_resumed_from_wherever_that_lies(tmp_path: Path) -> None:
    source = tmp_path / "run"
    make_trainer(source, PSSConfig.preset("paper", **SHARP), **{**STEPS, "max_steps": 6}).train()
    trainer = surviving(tmp_path / "rescued", PSSConfig.preset("paper", **SHARP), save_steps=4)
    spike(trainer, 100.0, steps=range(7, 13))
    trainer.train(resume_from_checkpoint=str(source / "checkpoint-6"))
    reasons = [event["reason"] for event in failures_of(tmp_path / "rescued")]
    # The one before it is of the same run, too.
    assert ["checkpoint-6" in reasons[0], "checkpoint-4" in reasons[1]] == [True, True]
    assert names_of(source) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_what_cannot_be_moved_away_is_said_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP))
    (tmp_path / "_pss_abandoned").write_text("in the way")
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert trainer.state.global_step == 16
    assert "checkpoint-10 cannot be moved" in caplog.text


def test_a_crash_right_after_a_rollback_does_not_undo_it(tmp_path: Path) -> None:
    class Ends(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.is_ending and state.global_step == SPIKE + 2:
                raise OSError("the plug was pulled")

    ends = []
    for is_ending in (False, True):
        folder = tmp_path / f"{is_ending}"
        trainer = surviving(folder, PSSConfig.preset("paper", **SHARP), save_total_limit=1)
        trainer.is_ending = is_ending
        spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
        trainer.add_callback(Ends())
        if is_ending:
            with pytest.raises(OSError, match="the plug"):
                trainer.train()
            assert names_of(folder)[-1] == "checkpoint-11"
            again = surviving(folder, PSSConfig.preset("paper", **SHARP), save_total_limit=1)
            again.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        ends.append(folder / "checkpoint-16")
    assert checkpoint_differences(*ends) == []


# ---- other set-ups ----


# 64 rows in batches of 4: 16 steps an epoch, 8 where two batches make a step.
@pytest.mark.parametrize(
    ("options", "first"),
    [
        pytest.param({"gradient_accumulation_steps": 2}, 5, id="accumulation"),
        pytest.param({"gradient_accumulation_steps": 2}, 7, id="into the second epoch"),
        pytest.param({"ignore_data_skip": True}, 5, id="data not skipped"),
    ],
)
def test_rates_rows_and_steps_go_on_as_in_the_plain_run(
    options: dict[str, Any], first: int, tmp_path: Path
) -> None:
    plain_seen, seen = Seen(), Seen()
    plain = make_trainer(tmp_path / "plain", **{**STEPS, **options})
    trainer = surviving(tmp_path / "run", PSSConfig.preset("paper", **SHARP), **options)
    spike(trainer, 100.0, steps=range(first, first + 3))
    for one, its in ((plain, plain_seen), (trainer, seen)):
        watch_rows(one, its)
        one.add_callback(its)
        one.train()
    (event,) = failures_of(tmp_path / "run")
    assert f"batches of steps {first} to {first + 2} skipped" in event["reason"]
    steps = [step for step, _ in seen.rates]
    assert steps == list(range(1, 17))
    assert seen.rates == plain_seen.rates
    if "ignore_data_skip" not in options:  # with it an epoch begins anew
        (_, _), (began, _) = seen.began
        after = [row for row in plain_seen.rows if row[0] > began]
        assert seen.rows[-len(after) :] == after
        assert trainer.state.epoch == plain.state.epoch


def test_the_best_model_is_loaded_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = surviving(
        tmp_path,
        PSSConfig.preset("paper", **SHARP),
        survival={"max_rollbacks": 1},
        eval_rows=token_rows(8),
        save_total_limit=1,
        metric_for_best_model="eval_first",
        **options,
    )
    loaded: list[str] = []
    inner, evaluate = trainer._load_best_model, trainer.evaluate

    def load() -> None:
        loaded.append(trainer.state.best_model_checkpoint)
        inner()

    def first_is_best(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        found["eval_first"] = -trainer.state.global_step
        return found

    trainer._load_best_model, trainer.evaluate = load, first_is_best
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert "back to checkpoint-8" in failures_of(tmp_path)[0]["reason"]
    assert loaded == [str(tmp_path / "checkpoint-2")]
    assert trainer.state.global_step == 16


def test_a_schedule_that_goes_by_losses_is_left_as_it_was_saved(tmp_path: Path) -> None:
    if "greedy" not in [one.value for one in SchedulerType]:
        pytest.skip("this release of transformers has no GreedyLR")
    options = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "greedy"}
    trainer = surviving(
        tmp_path, PSSConfig.preset("paper", **SHARP), eval_rows=token_rows(8), **options
    )
    spike(trainer, 100.0, steps=range(SPIKE, SPIKE + 3))
    trainer.train()
    assert "back to checkpoint-8" in failures_of(tmp_path)[0]["reason"]
    assert trainer.state.global_step == 16


@pytest.mark.parametrize(("spiked", "smoothings"), [(11, 1), (9, 2)])
def test_smoothing_on_resume_is_for_the_checkpoint_that_was_named(
    spiked: int, smoothings: int, tmp_path: Path
) -> None:
    """Gone back to a checkpoint of its own, which has been smoothed; or to that one once more."""
    make_trainer(tmp_path, PSSConfig.preset("paper", **SHARP), **{**STEPS, "max_steps": 8}).train()
    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP, smooth_on_resume=True))
    spike(trainer, 100.0, steps=range(spiked, spiked + 3))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert [event["decision"] for event in failures_of(tmp_path)] == ["roll_back"]
    resumes = [one for one in events_of(tmp_path) if one.get("trigger") == "resume"]
    assert len(resumes) == smoothings
    # And what is saved from there on is of a run that was smoothed, wherever it went back to.
    state = json.loads((tmp_path / "checkpoint-16" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["PSSCallback"]["attributes"]["smoothed_in"] == str(tmp_path)


# ---- where there is no going back ----


def test_a_backend_that_cannot_go_back_stops_with_the_checkpoints_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Sharded(PSSTrainer):
        """One process that says it were sharded where it is asked whether it can go back."""

        def _backend(self) -> str | None:
            return "FSDP"

    trainer = surviving(tmp_path, PSSConfig.preset("paper", **SHARP), trainer_class=Sharded)
    spike(trainer, 100.0, steps=range(SPIKE, 17))
    with pytest.raises(TrainingFailedError, match=r"under FSDP.*resume from .*checkpoint-8,"):
        trainer.train()
    assert "is not possible under FSDP" in caplog.text
    assert [event["decision"] for event in failures_of(tmp_path)] == ["stop"]


@pytest.mark.parametrize("option", [{"save_strategy": "no"}, {"save_only_model": True}])
def test_a_run_without_anything_to_go_back_to_is_told_at_its_start(
    option: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    surviving(tmp_path, PSSConfig.preset("paper"), max_steps=2, **option).train()
    assert "has no effect in this run" in caplog.text


def test_a_run_that_can_go_back_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    surviving(tmp_path, PSSConfig.preset("paper"), max_steps=2).train()
    assert "go back" not in caplog.text
