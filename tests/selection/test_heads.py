"""The attention modules with known heads, and the rows of these heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import bert, gpt2, llama
from torch import nn

from hf_pss.models.selection.heads import Heads, find_heads


@pytest.mark.parametrize(
    ("make", "name", "heads"),
    [
        (gpt2, "transformer.h.0.attn", Heads(2, 2, 8)),
        (llama, "model.layers.0.self_attn", Heads(2, 1, 8)),
        (bert, "bert.encoder.layer.0.attention.self", Heads(2, 2, 8)),
    ],
)
def test_heads_are_read(make: Any, name: str, heads: Heads) -> None:
    found, reasons = find_heads(make())
    assert reasons == {}
    assert (found[0].name, found[0].heads) == (name, heads)


def test_rows_within_heads() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=1,
        hidden_size=4,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=8,
    )
    ((attention,), _) = find_heads(GPTNeoXForCausalLM(config))
    rows = attention.key.stored_rows(torch.device("cpu"))
    assert rows.tolist() == [2, 3, 8, 9]  # [q q k k v v | q q k k v v]
    assert attention.query.linear is attention.key.linear


def test_rows_of_transposed_layers() -> None:
    attention = find_heads(gpt2())[0][0]
    assert attention.key.view.transposed
    assert attention.key.stored_rows(torch.device("cpu")).tolist() == list(range(16, 32))


def test_heads_that_do_not_fit_are_unknown() -> None:
    model = llama()
    model.model.layers[0].self_attn.k_proj = nn.Linear(16, 7)
    found, reasons = find_heads(model)
    assert len(found) == 1
    assert reasons == {"model.layers.0.self_attn": "k has 7 rows where its heads have 8"}


def test_modules_that_change_queries_or_keys_have_a_reason() -> None:
    from transformers import OlmoConfig, OlmoForCausalLM, Qwen3Config, Qwen3ForCausalLM

    small: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 8,
    }
    (reason,) = find_heads(Qwen3ForCausalLM(Qwen3Config(**small, head_dim=8)))[1].values()
    assert reason.startswith("q_norm normalises")
    held = llama()
    held.model.layers[1].self_attn.bias_u = nn.Parameter(torch.zeros(2, 8))
    (reason,) = find_heads(held)[1].values()
    assert reason.startswith("it holds bias_u")
    held.model.layers[1].self_attn.bias_u = None
    held.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(2))
    assert find_heads(held)[1] == {}
    held.model.layers[1].self_attn.clip_qkv = 8.0  # as DBRX, beside its configuration
    (reason,) = find_heads(held)[1].values()
    assert reason.startswith("clip_qkv")
    olmo = OlmoConfig(**small, clip_qkv=3.0, pad_token_id=0)
    (reason,) = find_heads(OlmoForCausalLM(olmo))[1].values()
    assert reason.startswith("clip_qkv")


def test_cross_attention_is_recognised() -> None:
    from transformers import (
        BartConfig,
        BartModel,
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2Model,
        T5Config,
        T5Model,
    )

    base = {"d_model": 16, "vocab_size": 8, "num_heads": 2}
    bart = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 8}
    bert = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    decoder = {"is_decoder": True, "add_cross_attention": True}
    gpt = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 8, "add_cross_attention": True}
    models = [
        BartModel(BartConfig(**bart)),
        BertModel(BertConfig(**bert, **decoder)),
        GPT2Model(GPT2Config(**gpt)),
        T5Model(T5Config(**base, d_kv=8, d_ff=8, num_layers=1)),
    ]
    for model in models:
        found, reasons = find_heads(model)
        assert reasons == {}
        names = {attention.name for attention in found if attention.is_cross_attention}
        assert len(names) == 1
        words = ("encoder_attn", "crossattention", "EncDecAttention")
        assert any(word in name for name in names for word in words)
