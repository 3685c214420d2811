"""Heads as matrices of their own: which, how they lie, and what a checkpoint makes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_battery import BATCH_TOLERANCE, largest, through_file
from test_groups import as_plain_matrices
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.optim import build_optimizer, describe_groups, layout
from hf_pss.optim.layout import by_head, layout_of, runs_of

LR = 0.05
LOGGER = "hf_pss.optim.groups"
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=32, bos_token_id=0, eos_token_id=0)
    )


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2))


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SMALL))


def phi3() -> Any:
    return Phi3ForCausalLM(Phi3Config(**_SMALL, num_key_value_heads=2, pad_token_id=0))


def falcon() -> Any:
    return FalconForCausalLM(
        FalconConfig(
            num_hidden_layers=1,
            hidden_size=16,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            vocab_size=32,
        )
    )


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=16, n_head=4, vocab_size=32))


def deepseek() -> Any:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_SMALL,
            num_key_value_heads=4,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=5,
            first_k_dense_replace=1,
        )
    )


def mimo() -> Any:
    """Values are wider than queries and keys."""
    return MiMoV2FlashForCausalLM(
        MiMoV2FlashConfig(
            **_SMALL,
            num_key_value_heads=2,
            head_dim=4,
            v_head_dim=8,
            pad_token_id=0,
            eos_token_id=0,
        )
    )


# Model, end of the parameter's name, rows of every head in stored order (transposed back).
CASES: list[tuple[Callable[[], Any], str, list[int]]] = [
    (gpt2, "c_attn.weight", [4] * 12),
    (llama, "q_proj.weight", [4] * 4),
    (llama, "k_proj.weight", [4] * 2),
    (llama, "v_proj.weight", [4] * 2),
    (neox, "query_key_value.weight", [4] * 12),
    (phi3, "qkv_proj.weight", [4] * 8),
    (falcon, "query_key_value.weight", [4] * 8),
    (bloom, "query_key_value.weight", [4] * 12),
    (mimo, "k_proj.weight", [4] * 2),
    (mimo, "v_proj.weight", [8] * 2),
    (deepseek, "q_b_proj.weight", [10] * 4),
    (deepseek, "kv_b_proj.weight", [6, 5] * 4),
]
WHOLE = [(gpt2, "attn.c_proj.weight"), (llama, "o_proj.weight"), (deepseek, "kv_a_proj_with_mqa")]


def stepped(model: nn.Module, **options: Any) -> dict[str, tuple[Tensor, ...]]:
    """Make three steps; return (before, gradients …, after) by name, outputs first."""
    optimizer = build_optimizer(model, lr=LR, dtype="float32", **options)
    parameters = named_parameters_canonical(model)
    seen = {name: [p.detach().clone()] for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=generator)
            seen[name].append(p.grad.clone())
        optimizer.step()
    is_gpt2 = isinstance(model, GPT2LMHeadModel)
    return {
        name: tuple(t.mT if is_gpt2 and t.ndim == 2 else t for t in (*seen[name], p.detach()))
        for name, p in parameters.items()
    }


def of(tensors: dict[str, Any], end: str) -> Any:
    (name,) = [name for name in tensors if end in name]
    return tensors[name]


@pytest.mark.parametrize(("make", "end", "sizes"), CASES)
def test_each_head_moves_as_a_matrix(make: Callable[[], Any], end: str, sizes: list[int]) -> None:
    tensors = of(stepped(make(), per_head=True), end)
    heads = zip(*(tensor.split(sizes) for tensor in tensors), strict=True)
    for head in heads:
        assert largest([head[-1]], [as_plain_matrices(head)]) <= BATCH_TOLERANCE


@pytest.mark.parametrize("make", dict.fromkeys(make for make, *_ in CASES))
def test_models_whose_heads_are_known_are_not_warned_of(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The compressed projections of latent attention have no heads."""
    with caplog.at_level(logging.WARNING, LOGGER):
        build_optimizer(make(), per_head=True)
    assert caplog.text == ""


def test_rows_are_those_of_all_heads(caplog: pytest.LogCaptureFixture) -> None:
    """A width that divides the rows is not enough."""
    model = llama()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model.model.layers[0].self_attn, name).weight.data = torch.zeros(32, 16)
    with caplog.at_level(logging.WARNING, LOGGER):
        build_optimizer(model, per_head=True)
    assert "per_head has no effect" in caplog.text


@pytest.mark.parametrize(("make", "end"), WHOLE)
def test_projections_without_heads_move_as_before(make: Callable[[], Any], end: str) -> None:
    torch.manual_seed(0)
    one = of(stepped(make(), per_head=True), end)
    torch.manual_seed(0)
    other = of(stepped(make()), end)
    assert largest([one[-1]], [other[-1]]) <= BATCH_TOLERANCE


def test_the_check_can_fail() -> None:
    tensors = of(stepped(llama()), "q_proj.weight")
    head = tuple(tensor[:4] for tensor in tensors)
    assert largest([head[-1]], [as_plain_matrices(head)]) > BATCH_TOLERANCE


@pytest.mark.parametrize("make", [gpt2, llama, neox, phi3, falcon])
def test_equal_heads_are_one_call(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads of a model, of whatever projection, are in one stack."""
    model = make()
    optimizer = build_optimizer(model, per_head=True)
    shapes: list[tuple[int, ...]] = []
    joined = layout._joined

    def watched(tensors: list[Tensor]) -> Tensor:
        found = joined(tensors)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(layout, "_joined", watched)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len([shape for shape in shapes if shape[-2:] == (4, 16)]) == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_views_share_memory(transposed: bool, size: int) -> None:
    """A write through the views reaches the parameter."""
    stored = torch.zeros(3, 24) if transposed else torch.zeros(24, 3)
    parts = tuple((start, size, 3 * size) for start in (0, size, 2 * size))
    layouts = [(transposed, parts)]
    if size > 1:
        layouts.append(by_head((transposed, parts), num_rows=24, head_rows=[size] * 3))
        layouts.append(by_head((transposed, parts[:2]), num_rows=24, head_rows=[size // 2, size]))
    for each in layouts:
        stored.zero_()
        views = runs_of(stored, each)
        for runs in views:
            runs += 1
        assert int(stored.sum()) == sum(runs.numel() for runs in views)


def test_the_table_counts_heads_and_unknown_ones_are_announced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = gpt2()
    lines = describe_groups(build_optimizer(model, per_head=True)).splitlines()
    assert ["1 by head" in line for line in lines] == [False, True, False, False]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, LOGGER):
        build_optimizer(model, per_head=True, exclude=["c_attn"])
    assert "per_head has no effect" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, LOGGER):
        build_optimizer(model, per_head=True, exclude=[r"\[v\]$"])
    assert "per_head has no effect" in caplog.text


@pytest.mark.parametrize("left_out", [[r"\[v\]$"], [r"\[k\]$", r"\[v\]$"]])
def test_a_projection_with_parts_left_out_is_one_matrix(left_out: list[str]) -> None:
    tensors = of(stepped(gpt2(), per_head=True, exclude=left_out), "c_attn.weight")
    assert largest([tensors[-1]], [as_plain_matrices(tensors)]) <= BATCH_TOLERANCE


def test_one_of_several_unknown_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.model.layers[0].self_attn.k_proj = nn.Linear(16, 7)
    with caplog.at_level(logging.WARNING, LOGGER):
        build_optimizer(model, per_head=True)
    assert "k_proj.weight are not known, so it is moved as without it" in caplog.text


@pytest.mark.parametrize("algo", ["muon", "normuon", "amuse"])
@pytest.mark.parametrize("before", [False, True])
def test_a_state_of_the_other_setting_is_loaded(algo: str, before: bool) -> None:
    """The momentum continues; the rule's state of other matrices does not."""
    model = gpt2()

    def step(optimizer: Any) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    first = build_optimizer(model, algo=algo, per_head=before)
    step(first)
    second = build_optimizer(model, algo=algo, per_head=not before)
    layouts = second.param_groups[0]["layouts"]
    second.load_state_dict(through_file(first.state_dict()))
    assert second.param_groups[0]["layouts"] == layouts
    for p in model.parameters():
        for name, value in first.state[p].items():
            if "." not in name and isinstance(value, Tensor):
                assert torch.equal(second.state[p][name], value)
    step(second)
    fused = model.transformer.h[0].attn.c_attn.weight
    if algo == "normuon":
        assert len(second.state[fused]["row_mean_square.0"]) == (1 if before else 12)
        proj = model.transformer.h[0].attn.c_proj.weight
        assert "row_mean_square.0" in second.state[proj]


def test_layouts_of_runs_are_complete() -> None:
    views = [v for v in select_matrices(neox()).matrices if v.name.endswith("]")]
    assert layout_of(views) == (False, ((0, 4, 12), (4, 4, 12), (8, 4, 12)))
    assert layout_of(views[:2]) == (False, ())
