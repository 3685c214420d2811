"""LoRA fine-tuning of small models on real text, with a batch whose gradient is far too large."""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import differences, events_of, make_trainer, steps_of, train, weights_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_pss import PSSCallback, PSSConfig, PSSTrainer

LENGTH, WIDTH, BYTES = 32, 32, 256
BASE_STEPS, STEPS, SPIKED_STEP = 150, 120, 30
FACTOR = 1000.0

# Validation loss at the end, about 2.8, against the run without the spike; measured: 0.009 (Llama)
# and 0.003 (GPT-2). The batch that was skipped is lost either way.
RECOVERED = 0.02
# The paper's 2.5 fires falsely now and then in runs as small as these, and what comes within its
# cooldown is observed only.
GUARD = PSSConfig.preset("paper", spike_update="skip", threshold_ratio=10.0)
TARGETS = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
}


def base_model(name: str) -> PreTrainedModel:
    set_seed(0)
    if name == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=BYTES,
                max_position_embeddings=LENGTH,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=WIDTH,
            n_head=2,
            vocab_size=BYTES,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def byte_rows(module: Any, *, backwards: bool = False) -> list[dict[str, Tensor]]:
    """Blocks of bytes of a module's source; read backwards it is another language."""
    content = Path(module.__file__).read_bytes()
    tokens = torch.tensor(list(content[::-1] if backwards else content))
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


class Spiked:
    """One batch has a loss, and so a gradient, 1,000 times too large."""

    spiked_step: int | None = None

    def compute_loss(self: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)  # type: ignore[misc]
        is_spiked = model.training and self.state.global_step + 1 == self.spiked_step
        return loss * FACTOR if is_spiked else loss


class SpikedPlainTrainer(Spiked, Trainer):
    pass


class SpikedPSSTrainer(Spiked, PSSTrainer):
    pass


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def fine_tune(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[float, Trainer]]:
    """Give a fine-tuning run on top of a base model that has learned something."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    base = train(
        folder / "base",
        model=base_model(name),
        rows=byte_rows(argparse),
        max_steps=BASE_STEPS,
        per_device_train_batch_size=8,
        save_strategy="no",
    ).model
    learned = weights_of(base)

    def run(
        pss: PSSConfig | None = None, *, spiked_step: int | None = None, **options: Any
    ) -> tuple[float, Trainer]:
        model = base_model(name)
        model.load_state_dict(learned)
        set_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, **TARGETS[name])
        trainer = make_trainer(
            folder / "fine",
            pss,
            trainer_class=SpikedPlainTrainer if pss is None else SpikedPSSTrainer,
            model=get_peft_model(model, config),
            rows=byte_rows(argparse, backwards=True),
            eval_rows=byte_rows(textwrap, backwards=True),
            **{
                "max_steps": STEPS,
                "per_device_train_batch_size": 8,
                "save_strategy": "no",
                **options,
            },
        )
        trainer.spiked_step = spiked_step
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer

    return run


@pytest.mark.parametrize("max_grad_norm", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_spike_leaves_no_trace_in_the_end(
    fine_tune: Callable[..., tuple[float, Trainer]], max_grad_norm: float
) -> None:
    clean, _ = fine_tune(max_grad_norm=max_grad_norm)
    loss, trainer = fine_tune(GUARD, spiked_step=SPIKED_STEP, max_grad_norm=max_grad_norm)
    (event,) = events_of(Path(trainer.args.output_dir))
    assert (event["kind"], event["step"]) == ("intervention", SPIKED_STEP)
    assert {m["status"] for m in event["matrices"]} == {"smoothed"}
    assert abs(loss - clean) <= RECOVERED
    if not max_grad_norm:
        harmed, _ = fine_tune(spiked_step=SPIKED_STEP, max_grad_norm=max_grad_norm)
        assert harmed - clean > RECOVERED, "without a guard there is something to recover from"


def adapted(seed: int = 1, **options: Any) -> nn.Module:
    set_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, **{**TARGETS["llama"], **options})
    return get_peft_model(base_model("llama"), config)


EAGER = {"threshold_ratio": 1.0001, "calibration_steps": 1, "cooldown_steps": 0}
SMALL = {"rows": byte_rows(textwrap), "save_steps": 4}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    pss = PSSConfig.preset("paper", **EAGER)
    whole = train(tmp_path / "whole", pss, model=adapted(), **SMALL)
    steps = steps_of(events_of(tmp_path / "whole"))
    assert min(steps) <= 4 < max(steps)
    resumed = train(
        tmp_path / "resumed",
        pss,
        model=adapted(),
        resume=str(tmp_path / "whole" / "checkpoint-4"),
        **SMALL,
    )
    assert not list(differences(weights_of(whole.model), weights_of(resumed.model)))
    assert steps_of(events_of(tmp_path / "resumed")) == [step for step in steps if step > 4]


def test_products_have_gradient_norms_and_stable_ranks_of_their_own(tmp_path: Path) -> None:
    pss = PSSConfig.preset(
        "paper",
        detectors=("matrix_grad_norm_ratio", "update_norm_ratio", "stable_rank_drop"),
        scope="fired",
        check_every_steps=2,
        health_every_steps=4,
        **EAGER,
    )
    trainer = train(tmp_path, pss, model=adapted(), **SMALL)
    names = {view.name for view in PSSCallback.of(trainer).controller.selection.adapters}
    (first, *_) = events_of(tmp_path, "pss_health.jsonl")
    assert set(first["stable_rank"]) == names
    own = [e for e in events_of(tmp_path) if e["detector"] == "matrix_grad_norm_ratio"]
    assert own
    for event in own:
        assert {m["name"] for m in event["matrices"]} == set(event["fired"]) < names


def test_moments_of_factors_are_kept_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        train(
            tmp_path,
            PSSConfig.preset("paper", moments="reset"),
            model=adapted(),
            max_steps=1,
            **SMALL,
        )
    assert "the first moments of LoRA factors are kept" in caplog.text


def test_full_copies_and_products_are_smoothed_together(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["o_proj"])
    train(tmp_path, PSSConfig.preset("paper", **EAGER), model=model, **SMALL)
    event = next(e for e in events_of(tmp_path) if e["kind"] == "intervention")
    names = [m["name"] for m in event["matrices"]]
    assert any("o_proj.modules_to_save.default.weight" in name for name in names)
    assert any(name.endswith("q_proj[default]") for name in names)
