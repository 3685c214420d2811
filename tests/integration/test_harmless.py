"""Fine-tuning trained weights: the default does no harm where plain training does none."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import arguments, events_of
from torch import Tensor
from trained import language, loss_of, odd_row, trained_gpt2
from transformers import Trainer

from hf_pss import PSSConfig, PSSTrainer
from hf_pss.config import PRESETS

HELD = language(7, 256)
STEPS = 40
# Batches of one row, so that an odd row is an odd batch.
ODD = {"per_device_train_batch_size": 1, "learning_rate": 1e-4}


def rows_with_odd_ones(seed: int) -> list[dict[str, Tensor]]:
    """Return rows of another language, every twelfth of which makes the gradient jump."""
    rows = language(7, 2048 + 32 * seed)[-2048:]
    rows[seed % 12 :: 12] = odd_row()
    return [{"input_ids": row, "labels": row} for row in rows]


def fine_tune(
    folder: Path, config: PSSConfig | None, seed: int = 0, *, adapted: bool = False, **options: Any
) -> float:
    """Return the loss on held-out rows after a fine-tuning; None trains with the plain Trainer."""
    model: Any = trained_gpt2()
    if adapted:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        lora = peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    args = arguments(
        folder,
        **{
            "max_steps": STEPS,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            "seed": seed,
            "logging_steps": STEPS,
            **options,
        },
    )
    rows = rows_with_odd_ones(seed)
    if config is None:
        trainer = Trainer(model=model, args=args, train_dataset=rows)
    else:
        trainer = PSSTrainer(model=model, args=args, train_dataset=rows, pss_config=config)
    trainer.train()
    return loss_of(trainer.model, HELD)


@cache
def plain_loss() -> float:
    """Return the loss after a fine-tuning with the plain Trainer, with `ODD`."""
    with TemporaryDirectory() as folder:
        return fine_tune(Path(folder), None, **ODD)


def spikes_in(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(folder) if event["detector"] == "grad_norm_ratio"]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_false_alarms_do_no_harm(adapted: bool, tmp_path: Path) -> None:
    differences = []
    for seed, (batch, rate) in enumerate([(1, 1e-3), (2, 1e-4), (8, 2e-5), (1, 2e-5)]):
        options = {"per_device_train_batch_size": batch, "learning_rate": rate}
        plain = fine_tune(tmp_path / f"plain{seed}", None, seed, adapted=adapted, **options)
        folder = tmp_path / f"pss{seed}"
        ours = fine_tune(folder, PSSConfig(calibration_steps=5), seed, adapted=adapted, **options)
        differences.append(ours - plain)
    spikes = [event for i in range(4) for event in spikes_in(tmp_path / f"pss{i}")]
    assert len(spikes) >= 3, "the odd rows were to raise alarms"
    assert abs(mean(differences)) <= 0.005
    assert max(differences) <= 0.02


@pytest.mark.parametrize("name", PRESETS)
def test_one_odd_batch_under_every_preset(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plain_loss()
    config = PSSConfig.preset(name, **({} if name == "floor" else {"calibration_steps": 5}))
    ours = fine_tune(tmp_path / "pss", config, **ODD)
    if name == "paper":
        assert ours > plain + 0.02, "as published it is to do harm here, or this test shows nothing"
        assert "look trained" in caplog.text
        tried = PSSConfig.preset("paper", calibration_steps=5, trial="spikes")
        ours = fine_tune(tmp_path / "tried", tried, **ODD)
        decisions = {event["decision"] for event in spikes_in(tmp_path / "tried")}
        assert "undo" in decisions
    assert ours <= plain + 0.02


@pytest.mark.parametrize("smoothing", ["clip", "log", "softplus", "convolution", "softmax"])
def test_every_smoothing_function_that_the_default_can_reach(
    smoothing: str, tmp_path: Path
) -> None:
    config = PSSConfig(calibration_steps=5, smoothing=smoothing)
    assert fine_tune(tmp_path / "pss", config, **ODD) <= plain_loss() + 0.005
    assert spikes_in(tmp_path / "pss")
