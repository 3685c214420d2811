"""Resumed ≡ uninterrupted, bit for bit, with interventions before and after the checkpoint."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EAGER,
    checkpoint_differences,
    controller_of,
    differences,
    events_of,
    history,
    make_trainer,
    steps_of,
    train,
    weights_of,
)
from transformers import default_data_collator

from hf_pss import PSSConfig

MIDDLE = 4
QUICK = {"calibration_steps": 1, "cooldown_steps": 0, "threshold_ratio": 1.0001}
HIGH_FLOOR = {"floor_ratio": 1.3, "check_every_steps": 1}

# Each intervenes before and after step 4 of 8.
CONFIGS = {
    "paper": EAGER,
    "paper, skipping": PSSConfig.preset("paper", **QUICK, spike_update="skip", smoothing="log"),
    "floor": PSSConfig.preset("floor", **HIGH_FLOOR),
    "floor of noise": PSSConfig.preset("floor", **HIGH_FLOOR, floor_reference="noise"),
    "anchored": PSSConfig.preset("anchored", **QUICK, **HIGH_FLOOR),
    # Every edit is taken back; and some are, some are not.
    "undone": PSSConfig.preset("paper", **QUICK, trial="spikes", trial_margin_ratio=1e-9),
    "tried": PSSConfig.preset(
        "anchored",
        **QUICK,
        trial="all",
        trial_margin_ratio=4e-5,
        floor_ratio=1.2,
        floor_reference="noise",
        check_every_steps=1,
        moments="project",
    ),
    "matrix ratio": PSSConfig.preset(
        "paper", detectors=("matrix_grad_norm_ratio",), **QUICK, scope="fired", keep_frobenius=True
    ),
    "update ratio": PSSConfig.preset("paper", detectors=("update_norm_ratio",), **QUICK),
    "drop": PSSConfig.preset(
        "paper",
        detectors=("stable_rank_drop",),
        stable_rank_drop=1e-6,
        calibration_steps=1,
        cooldown_steps=0,
        check_every_steps=1,
        smoothing="convolution",
    ),
}


def _without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def _state(folder: Path) -> str:
    return (folder / "trainer_state.json").read_text()


# Each configuration once; and what else a run may do differently, with two of them.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "paper, restoring": ("paper", {"restore_callback_states_from_checkpoint": True}),
    "anchored, restoring": ("anchored", {"restore_callback_states_from_checkpoint": True}),
    "anchored, accumulating": ("anchored", {"gradient_accumulation_steps": 3}),
    "anchored, bf16": ("anchored", {"bf16": True}),
    "anchored, unclipped": ("anchored", {"max_grad_norm": 0.0}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run: str, tmp_path: Path) -> None:
    name, run_options = RUNS[run]
    config = CONFIGS[name]
    options: dict[str, Any] = {
        "save_steps": MIDDLE,
        # Updates that grow with every step, so that the detector of update norms fires.
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 8,
        **run_options,
    }
    whole = train(tmp_path, config, **options)
    events, last = events_of(tmp_path), tmp_path / "checkpoint-8"
    acted = steps_of(events)
    assert min(acted) <= MIDDLE < max(acted), acted

    last = last.rename(tmp_path / "whole")
    resumed = train(tmp_path, config, resume=str(tmp_path / "checkpoint-4"), **options)
    # The closing line's train_loss counts only the steps since the resume: the Trainer's own way.
    assert list(differences(history(whole)[:-1], history(resumed)[:-1])) == []
    assert list(differences(weights_of(whole.model), weights_of(resumed.model))) == []
    assert checkpoint_differences(last, tmp_path / "checkpoint-8") == []
    assert _state(last) == _state(tmp_path / "checkpoint-8")
    assert _without_clock(events_of(tmp_path)) == _without_clock(events)
    superseded = events_of(tmp_path, "pss_events.superseded.jsonl")
    assert superseded == [event for event in events if event["step"] > MIDDLE]


def test_equal_runs_save_equal_states(tmp_path: Path) -> None:
    config = replace(CONFIGS["anchored"], health="full", health_every_steps=2)
    for folder in ("one", "other"):
        train(tmp_path / folder, config, save_steps=8)
    one, other = (_state(tmp_path / folder / "checkpoint-8") for folder in ("one", "other"))
    assert one == other


def masking(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Mask labels at random, as run_mlm.py masks words."""
    batch = default_data_collator(examples)
    batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
    return batch


def masking_by_batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Mask labels by random numbers that depend on the batch alone, as docs/guides says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(repr(examples).encode()))
        return masking(examples)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("collate", "is_exact"), [(masking, False), (masking_by_batch, True)])
def test_a_collator_that_draws_random_numbers_resumes_exactly_if_it_seeds_them(
    collate: Any, is_exact: bool, num_workers: int, tmp_path: Path
) -> None:
    """Or else it draws others: also in the plain Trainer, which collates a batch ahead."""
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = make_trainer(tmp_path, save_steps=MIDDLE, dataloader_num_workers=num_workers)
        trainer.data_collator = collate
        trainer.train(resume_from_checkpoint=resume)
        ends.append(weights_of(trainer.model))
    assert (list(differences(*ends)) == []) == is_exact


@pytest.mark.parametrize("name", ["undone", "tried"])
def test_trials_end_in_both_ways_before_and_after_the_middle(name: str, tmp_path: Path) -> None:
    train(tmp_path, CONFIGS[name])
    ends = {
        half: {event["decision"] for event in events_of(tmp_path) if half(event["step"])}
        for half in (lambda step: step <= MIDDLE, lambda step: step > MIDDLE)
    }
    wanted = {"undo"} if name == "undone" else {"undo", "act"}
    assert all(found >= wanted for found in ends.values()), ends


def test_edits_that_are_taken_back_leave_the_plain_run(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    undone = train(tmp_path / "undone", CONFIGS["undone"])
    assert {event["decision"] for event in events_of(tmp_path / "undone")} == {"undo"}
    assert list(differences(weights_of(plain.model), weights_of(undone.model))) == []


def test_the_record_of_healthy_values_survives_a_resume(tmp_path: Path) -> None:
    """Its record is of step 0 until step 100: a resumed run must not restart it."""
    config = PSSConfig(threshold_ratio=1e9, floor_ratio=1e-6)
    first = controller_of(train(tmp_path, config, save_steps=MIDDLE)).state_dict()
    resumed = train(tmp_path, config, resume=str(tmp_path / "checkpoint-4"))
    assert controller_of(resumed).state_dict()["anchors"] == first["anchors"]
    assert first["anchors"] is not None


def test_the_floor_of_a_resumed_run_refers_to_the_first_start(tmp_path: Path) -> None:
    config = CONFIGS["floor"]
    first = controller_of(train(tmp_path, config, save_steps=MIDDLE)).state_dict()
    resumed = train(tmp_path, config, resume=str(tmp_path / "checkpoint-4"))
    assert controller_of(resumed).state_dict()["starting_ranks"] == first["starting_ranks"]


def test_options_of_the_resumed_run_win_over_the_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, CONFIGS["paper"], save_steps=MIDDLE, max_steps=MIDDLE)
    resumed = train(
        tmp_path,
        PSSConfig.preset("paper", threshold_ratio=1e9),
        resume=str(tmp_path / "checkpoint-4"),
        restore_callback_states_from_checkpoint=True,
    )
    assert controller_of(resumed).config.threshold_ratio == 1e9
    assert controller_of(resumed).step_number == 8
    assert all(step <= MIDDLE for step in steps_of(events_of(tmp_path)))


@pytest.mark.parametrize("restoring", [False, True])
def test_a_plain_checkpoint_resumes_under_pss(
    restoring: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, save_steps=MIDDLE, max_steps=MIDDLE)
    resumed = train(
        tmp_path,
        EAGER,
        resume=str(tmp_path / "checkpoint-4"),
        restore_callback_states_from_checkpoint=restoring,
    )
    assert "fresh baseline at step 4" in caplog.text
    assert "written without PSS" in caplog.text
    assert controller_of(resumed).step_number == 8
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").exists()
    assert steps_of(events_of(tmp_path))


@pytest.mark.parametrize("restoring", [False, True])
def test_a_pss_checkpoint_resumes_under_the_plain_trainer(restoring: bool, tmp_path: Path) -> None:
    train(tmp_path, EAGER, save_steps=MIDDLE, max_steps=MIDDLE)
    resumed = train(
        tmp_path,
        resume=str(tmp_path / "checkpoint-4"),
        restore_callback_states_from_checkpoint=restoring,
    )
    assert resumed.state.global_step == 8
    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists()


def test_a_state_that_plain_steps_made_stale_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, EAGER, save_steps=2, max_steps=2)
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"), save_steps=MIDDLE, max_steps=MIDDLE)
    resumed = train(tmp_path, EAGER, resume=str(tmp_path / "checkpoint-4"))
    assert "The PSS state is of step 2" in caplog.text
    assert controller_of(resumed).step_number == 8


def _without_attributes(saved: dict[str, Any]) -> None:
    del saved["attributes"]


def _truncated(saved: dict[str, Any]) -> None:
    del saved["attributes"]["saved_state"]["history"]


def _newer(saved: dict[str, Any]) -> None:
    saved["attributes"]["saved_state"]["version"] = 99


def _garbage(saved: dict[str, Any]) -> None:
    saved["attributes"]["saved_state"] = [1, "garbage"]


def _not_strict(saved: dict[str, Any]) -> None:
    saved["attributes"]["saved_state"]["step"] = float("nan")


# Every way to damage a state is tried on the controller; here, that the Trainer survives.
DAMAGE = (_without_attributes, _truncated, _newer, _garbage, _not_strict)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    train(folder, CONFIGS["anchored"], save_steps=2, max_steps=2)
    text = (folder / "checkpoint-2" / "trainer_state.json").read_text()
    return folder / "checkpoint-2", json.loads(text)


@pytest.mark.parametrize(
    ("damage", "restoring"), [*((damage, False) for damage in DAMAGE), (_garbage, True)]
)
def test_a_damaged_state_means_a_warning_and_a_fresh_baseline(
    damage: Callable[[dict[str, Any]], None],
    restoring: bool,
    saved_run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint, state = saved_run
    damaged = json.loads(json.dumps(state))
    damage(damaged["stateful_callbacks"]["PSSCallback"])
    (checkpoint / "trainer_state.json").write_text(json.dumps(damaged))
    resumed = train(
        tmp_path,
        CONFIGS["anchored"],
        resume=str(checkpoint),
        max_steps=4,
        restore_callback_states_from_checkpoint=restoring,
    )
    warnings = [r for r in caplog.records if r.name.startswith("hf_pss")]
    fresh = [r for r in warnings if "fresh baseline at step 2" in r.getMessage()]
    assert [r.levelno for r in fresh] == [logging.WARNING]
    assert controller_of(resumed).step_number == 4
    assert resumed.state.global_step == 4


def test_an_intact_state_brings_no_warning(
    saved_run: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, state = saved_run
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    train(tmp_path, CONFIGS["anchored"], resume=str(checkpoint), max_steps=4)
    assert "fresh baseline" not in caplog.text


def test_another_selection_is_another_model(
    saved_run: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, state = saved_run
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    config = PSSConfig.preset("anchored", **QUICK, **HIGH_FLOOR, roles=("mlp",))
    train(tmp_path, config, resume=str(checkpoint), max_steps=4)
    assert "different weight matrices" in caplog.text
