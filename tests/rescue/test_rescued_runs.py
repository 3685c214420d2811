"""What rescue advises, done: the run ends where the undamaged one does; left alone it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from failing_runs import NUM_STEPS, fail
from helpers import gpt2, make_trainer, token_rows
from transformers import Trainer

from hf_pss import PSSConfig
from hf_pss.rescue.investigate import investigate

# Of validation losses, over three seeds and three damages: worst measured 0.0053.
TOLERANCE = 0.015
SEED: dict[str, Any] = {"seed": 1, "data_seed": 1}


def loss_of(trainer: Trainer) -> float:
    return float(trainer.evaluate(eval_dataset=token_rows(32))["eval_loss"])


@pytest.mark.parametrize("how", ["huge_rate", "decay", "nan"])
def test_a_rescued_run_ends_where_the_sound_one_does(tmp_path: Path, how: str) -> None:
    sound = loss_of(fail(tmp_path / "sound", "sound", **SEED))
    untreated = loss_of(fail(tmp_path / "run", how, **SEED))
    assert not untreated < sound + 0.5
    chosen = investigate(tmp_path / "run", margin_steps=20).choice.chosen
    assert chosen is not None
    trainer = make_trainer(
        tmp_path / "again",
        PSSConfig.preset("floor", smooth_on_resume=True),
        model=gpt2(num_layers=2, width=32),
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **SEED,
    )
    trainer.train(resume_from_checkpoint=str(chosen.path))
    assert abs(loss_of(trainer) - sound) <= TOLERANCE
