"""Experts that a checkpoint keeps under other names come back on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import gpt2, history, make_trainer, mixtral, token_rows, weights_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_pss import PSSConfig
from hf_pss.trainer.resuming import load_renamed_


def seeded(seed: int) -> PreTrainedModel:
    set_seed(seed)
    return mixtral(max_position_embeddings=12)


def resumed(folder: Path, checkpoint: Path, **options: object) -> Trainer:
    """Another initialisation: what is not loaded shows."""
    trainer = make_trainer(folder, model=seeded(4), rows=token_rows(), save_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in history(trainer) if "loss" in line]


def test_a_mixture_of_experts_resumes_exactly(tmp_path: Path) -> None:
    pss = PSSConfig.preset("paper")
    run = make_trainer(tmp_path / "run", pss, model=seeded(3), rows=token_rows(), save_steps=4)
    run.train()
    again = resumed(tmp_path / "again", tmp_path / "run" / "checkpoint-4", pss=pss)
    assert losses(again) == losses(run)
    for name, weight in weights_of(run.model).items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    run = make_trainer(
        tmp_path,
        PSSConfig.preset("paper"),
        model=seeded(3),
        rows=token_rows(),
        eval_rows=token_rows(8),
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_samples_per_second",  # not the last one: made so below
    )

    class First(TrainerCallback):
        def on_evaluate(self, *args: object, metrics: dict[str, float], **kwargs: object) -> None:
            metrics["eval_samples_per_second"] = -float(run.state.global_step)

    run.add_callback(First())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, best[name]), name


def test_a_model_in_shards_is_left_alone(tmp_path: Path) -> None:
    seeded(3).save_pretrained(tmp_path)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = seeded(4)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert load_renamed_(model, tmp_path) == ()
    finally:
        torch.distributed.destroy_process_group()


def test_the_plain_trainer_still_does_not(tmp_path: Path) -> None:
    """When this fails, transformers has mended it: `load_renamed_` can go."""
    run = make_trainer(tmp_path / "run", model=seeded(3), rows=token_rows(), save_steps=4)
    run.train()
    again = resumed(tmp_path / "again", tmp_path / "run" / "checkpoint-4")
    assert losses(again)[4:] != losses(run)[4:]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_under_its_own_names_is_left_alone(tied: bool, tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert load_renamed_(model, tmp_path) == ()
    assert load_renamed_(torch.nn.Linear(2, 2), tmp_path) == ()
    assert load_renamed_(model, tmp_path / "nothing here") == ()


def test_sharded_checkpoints_too(tmp_path: Path) -> None:
    seeded(3).save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    other = seeded(4)
    assert len(load_renamed_(other, tmp_path)) == 3  # gate, gate_up_proj, down_proj
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        assert torch.equal(other.state_dict()[key], seeded(3).state_dict()[key])
