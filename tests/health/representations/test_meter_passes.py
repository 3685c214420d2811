"""The forward passes and tokens that the hooks of a training step count."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from armed_meter import armed, hooks_of
from helpers import gpt2, llama
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from hf_pss.health.representations import token_cosine
from hf_pss.models.selection import named_parameters_canonical

EXACT_TOLERANCE = 1e-5  # 6.0e-8: other shapes of products
NUM_TOKENS = 32


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(1, 48, (4, 8))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def num_tokens(meter: Any) -> int:
    return meter._samples[meter._blocks[0]].num_seen


# ---- passes ----


# Its new name is unknown to the oldest release that we support.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_a_pass_without_gradients_is_not_counted(use_reentrant: bool | None) -> None:
    """The pass of a reference model, or generation, may be in training mode, too."""
    torch.manual_seed(0)
    model = llama().train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    rows = batch()
    meter, _ = armed(model)
    with torch.no_grad():
        model(**rows)
        assert meter._norms == {}
    model(**rows).loss.backward()
    with torch.no_grad():
        model(**rows)
    assert {sample.num_seen for sample in meter._samples.values()} == {NUM_TOKENS}
    assert {len(found) for found in meter._alignments.values()} == {1}
    meter.disarm()


def test_a_part_that_is_called_by_itself_is_counted() -> None:
    model = llama().train()
    meter, _ = armed(model)
    with torch.no_grad():
        model(**batch())
    model.model(input_ids=batch()["input_ids"]).last_hidden_state.sum().backward()
    assert {sample.num_seen for sample in meter._samples.values()} == {NUM_TOKENS}
    meter.disarm()


def test_hooks_without_a_reading_last_for_one_step() -> None:
    """A step that raised leaves hooks behind, and no callback follows."""
    model = gpt2().train()
    meter, _ = armed(model)
    is_measuring = []

    def watch() -> Any:
        is_measuring.append(True)
        return lambda: (is_measuring.clear() or {"attention": torch.ones(2)}, 0.5)

    meter.watch_attention(watch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):  # the micro-batches of a step
        model(**batch()).loss.backward()
    assert hooks_of(model) > 0
    assert is_measuring
    optimizer.step()
    model(**batch()).loss.backward()
    assert hooks_of(model) == 0
    assert not is_measuring
    # A step with two updates, as with sharpness-aware ones, keeps the tokens before the first.
    assert meter.seconds > 0.5
    assert {len(found) for found in meter._alignments.values()} == {2}
    assert meter.read(named_parameters_canonical(model))["token_cosine"]


# ---- tokens ----


def sequences() -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        vocab_size=48,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).train()


def test_the_mask_of_an_encoder_is_not_the_decoders(caplog: pytest.LogCaptureFixture) -> None:
    """With equally long sequences the number of tokens does not distinguish them."""
    torch.manual_seed(0)
    model = sequences()
    rows = batch()
    rows["attention_mask"][:, 5:] = 0
    plain = model(**rows, output_hidden_states=True)
    meter, directions = armed(model)
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "hf_pss"):
            meter.arm(directions)
            model(**rows)
            seen = {name: sample.num_seen for name, sample in meter._samples.items()}
            found = meter.read(named_parameters_canonical(model))
    assert seen == {"encoder.block.0": 20, "decoder.block.0": NUM_TOKENS}
    counted = {name: len(x[0]) for name, x in meter._alignments.items()}
    assert counted["encoder.block.0.layer.0.SelfAttention.q.weight"] == 20
    assert counted["decoder.block.0.layer.0.SelfAttention.q.weight"] == NUM_TOKENS
    assert len(caplog.records) == 1
    assert "does not fit the tokens of decoder.block.0:" in caplog.text
    # The last hidden states have passed the final norm, whose gain is 1: other lengths, one cosine.
    by_hand = token_cosine(plain.decoder_hidden_states[-1].flatten(0, 1))
    assert found["token_cosine"]["decoder.block.0"] == pytest.approx(
        float(by_hand), abs=EXACT_TOLERANCE
    )


def test_the_mask_does_not_apply_to_virtual_tokens(caplog: pytest.LogCaptureFixture) -> None:
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = get_peft_model(gpt2(), virtual).train().requires_grad_(True)
    meter, _ = armed(tuned)
    rows = batch()
    with caplog.at_level(logging.WARNING, "hf_pss"):
        tuned(**rows)
        assert num_tokens(meter) == NUM_TOKENS + 2 * 4
        meter._warn_unmasked()
        # Nothing was masked. transformers may warn once in a process.
        assert not [r for r in caplog.records if r.name.startswith("hf_pss")]
        rows["attention_mask"][0, 5:] = 0
        tuned(**rows)
        meter.read(named_parameters_canonical(tuned))
    assert "transformer.h.0: all of them count" in caplog.text
