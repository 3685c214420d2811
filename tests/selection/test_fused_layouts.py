"""The layout table against the forward passes it describes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import BY_NAME
from torch import Tensor, nn

from hf_pss.models.selection import (
    MatrixView,
    RowPattern,
    named_parameters_canonical,
    select_matrices,
)
from hf_pss.models.selection.layouts import FOREIGN_LAYOUTS, LAYOUTS

# Measured worst case: 0, the same sums of the same numbers; 9.6e-21 where SiLU(-50) stands for 0.
UNCHANGED = 2e-20
# Measured smallest change where one is due: 0.16 (nn.MultiheadAttention), 0.47 (Persimmon).
CHANGED = 0.06

INPUT = torch.arange(1, 7).reshape(1, 6)

# architecture → (fused projection, projection of the attention's output)
FUSED_ATTENTION = {
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    "openai-gpt": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    "gpt_bigcode-mqa": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    "gpt_bigcode-mha": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.attention.dense",
    ),
    "bloom": (
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention.dense",
    ),
    "falcon-old": (
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention.dense",
    ),
    "falcon-mqa": (
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention.dense",
    ),
    "falcon-new": (
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention.dense",
    ),
    "mpt": ("transformer.blocks.0.attn.Wqkv", "transformer.blocks.0.attn.out_proj"),
    "codegen": ("transformer.h.0.attn.qkv_proj", "transformer.h.0.attn.out_proj"),
    "persimmon": ("model.layers.0.self_attn.query_key_value", "model.layers.0.self_attn.dense"),
    "phi3": ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"),
    "modernbert": ("model.layers.0.attn.Wqkv", "model.layers.0.attn.Wo"),
    "deberta": (
        "deberta.encoder.layer.0.attention.self.in_proj",
        "deberta.encoder.layer.0.attention.output.dense",
    ),
}

Edit = Callable[[Tensor], None]


def rows_of(model: nn.Module, projection: str) -> dict[str, RowPattern]:
    """Return the output rows of the views of a fused projection, by label."""
    views = [
        v for v in select_matrices(model).matrices if v.parameter_name == f"{projection}.weight"
    ]
    return {v.name.partition("[")[2].rstrip("]"): v.rows for v in views if v.rows is not None}


def part_of(output: Tensor, rows: RowPattern) -> Tensor:
    """Return a writable view of the features of a projection's output that belong to a part."""
    periods = torch.unflatten(output, -1, (-1, rows.period))
    return periods[..., rows.start : rows.start + rows.size]


@contextmanager
def edited(module: nn.Module, edit: Edit) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        edit(output)
        return output

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def input_of(model: nn.Module, consumer: str, fused: str, edit: Edit) -> Tensor:
    """Return the input of `consumer` after an edit of the output of the `fused` projection."""
    seen: list[Tensor] = []
    handle = model.get_submodule(consumer).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    with torch.no_grad(), edited(model.get_submodule(fused), edit):
        model(INPUT)
    handle.remove()
    return seen[0].reshape(INPUT.shape[1], -1)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def keep(output: Tensor) -> None:
    pass


def at_first_token(rows: RowPattern) -> Edit:
    def edit(output: Tensor) -> None:
        part = part_of(output.reshape(INPUT.shape[1], -1), rows)
        part[0] += torch.linspace(-3, 3, part[0].numel()).reshape(part[0].shape)

    return edit


def zeroed(rows: RowPattern) -> Edit:
    def edit(output: Tensor) -> None:
        part_of(output, rows).zero_()

    return edit


def spread_weights(model: nn.Module) -> nn.Module:
    """Enlarge the weights, so that attention is far from uniform and a wrong part is visible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_queries_keys_and_values_are_those_of_the_forward(name: str) -> None:
    """A token's query changes its own output only, its key that of others, values all outputs."""
    model = spread_weights(BY_NAME[name].build())
    fused, out = FUSED_ATTENTION[name]
    rows = rows_of(model, fused)
    assert set(rows) == {"q", "k", "v"}
    plain = input_of(model, out, fused, keep)
    with_q = input_of(model, out, fused, at_first_token(rows["q"]))
    with_k = input_of(model, out, fused, at_first_token(rows["k"]))
    assert difference(with_q[1:], plain[1:]) <= UNCHANGED
    assert difference(with_k[1:], plain[1:]) >= CHANGED
    assert difference(input_of(model, out, fused, zeroed(rows["v"])), torch.zeros(())) <= UNCHANGED
    assert difference(input_of(model, out, fused, zeroed(rows["k"])), torch.zeros(())) >= CHANGED


def test_the_check_fails_on_a_wrong_layout() -> None:
    """GPT-NeoX divided into thirds like GPT-2 mixes queries, keys and values of heads."""
    model = spread_weights(BY_NAME["gpt_neox"].build())
    fused, out = FUSED_ATTENTION["gpt_neox"]
    thirds = {label: RowPattern(32 * i, 32, 96) for i, label in enumerate("qkv")}
    plain = input_of(model, out, fused, keep)
    with_q = input_of(model, out, fused, at_first_token(thirds["q"]))
    assert difference(with_q[1:], plain[1:]) >= CHANGED
    no_values = input_of(model, out, fused, zeroed(thirds["v"]))
    assert difference(no_values, torch.zeros(())) >= CHANGED


def test_the_gate_of_qwen3_next_scales_the_attention_output() -> None:
    model = spread_weights(BY_NAME["qwen3_next"].build())
    fused, out = (f"model.layers.1.self_attn.{leaf}" for leaf in ("q_proj", "o_proj"))
    rows = rows_of(model, fused)

    def closed(output: Tensor) -> None:
        part_of(output, rows["gate"]).fill_(-100.0)

    assert difference(input_of(model, out, fused, closed), torch.zeros(())) <= UNCHANGED
    without_q = input_of(model, out, fused, zeroed(rows["q"]))
    assert difference(without_q, torch.zeros(())) >= CHANGED


def test_the_values_of_latent_and_linear_attention() -> None:
    for name, fused, out in (
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj", "model.layers.0.self_attn.o_proj"),
        (
            "qwen3_next",
            "model.layers.0.linear_attn.in_proj_qkvz",
            "model.layers.0.linear_attn.norm",
        ),
        (
            "qwen3_5_text",
            "model.layers.0.linear_attn.in_proj_qkv",
            "model.layers.0.linear_attn.norm",
        ),
    ):
        model = spread_weights(BY_NAME[name].build())
        rows = rows_of(model, fused)
        for label, pattern in rows.items():
            reaches = input_of(model, out, fused, zeroed(pattern)).abs().max().item()
            # Without queries or keys a linear attention gives nothing either.
            empty = label == "v" or (name != "deepseek_v3" and label in "qk")
            assert (reaches <= UNCHANGED) == empty, (name, label)


# architecture → (fused projection, projection of the activations, labels of [activated, other])
FUSED_MLP = {
    "phi3": ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", ("gate", "up")),
    "glm": ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", ("gate", "up")),
    "glm4": ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", ("gate", "up")),
    "modernbert": ("model.layers.0.mlp.Wi", "model.layers.0.mlp.Wo", ("input", "gate")),
    "granitemoeshared": (
        "model.layers.0.shared_mlp.input_linear",
        "model.layers.0.shared_mlp.output_linear",
        ("gate", "up"),
    ),
}


@pytest.mark.parametrize("name", FUSED_MLP)
def test_the_activation_acts_on_the_part_named_first(name: str) -> None:
    """act(-100)·1 vanishes for SiLU and GELU, act(1)·(-100) does not."""
    model = BY_NAME[name].build()
    fused, out, (activated, other) = FUSED_MLP[name]
    rows = rows_of(model, fused)

    def set_parts(first: float, second: float) -> Edit:
        def edit(output: Tensor) -> None:
            part_of(output, rows[activated]).fill_(first)
            part_of(output, rows[other]).fill_(second)

        return edit

    assert (
        difference(input_of(model, out, fused, set_parts(-100.0, 1.0)), torch.zeros(()))
        <= UNCHANGED
    )
    assert difference(input_of(model, out, fused, set_parts(1.0, -100.0)), torch.zeros(())) >= 50


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe"])
def test_experts_are_gated_by_the_part_named_gate(name: str) -> None:
    """Gates of -50 silence every expert; up projections of -50 do not."""
    model = BY_NAME[name].build()
    matrices = select_matrices(model).matrices
    views = {
        v.name.rpartition(".")[2]: v
        for v in matrices
        if "layers.1" in v.name and "experts." in v.name
    }
    experts = model.get_submodule(views["down_proj"].parameter_name.removesuffix(".down_proj"))
    assert views["down_proj"].shape == (4, 32, views["gate_up_proj[gate]"].shape[-2])
    parameters = named_parameters_canonical(model)

    def fill(view: MatrixView, value: float) -> None:
        view.write_(parameters[view.parameter_name], torch.full(view.shape, value / view.shape[-1]))

    def response(gate: float, up: float) -> float:
        fill(views["gate_up_proj[gate]"], gate)
        fill(views["gate_up_proj[up]"], up)
        fill(views["down_proj"], 1.0)
        with torch.no_grad():
            ones = torch.ones(4, 32)
            routed = (torch.arange(4)[:, None], torch.ones(4, 1))
            out = experts(ones) if name == "llama4_text" else experts(ones, *routed)
        return float(out.abs().max())

    with torch.no_grad():
        for bias_name, bias in experts.named_parameters():
            if "bias" in bias_name:
                bias.zero_()
    assert response(gate=-50.0, up=1.0) <= UNCHANGED
    # GPT-OSS clamps its ups at -7.
    assert response(gate=1.0, up=-50.0) >= 4


def test_torch_multihead_attention_is_split_as_its_own_code_splits_it() -> None:
    """Without values only the output's bias is left. Without queries, keys have no effect."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    views = {v.name: v for v in select_matrices(nn.ModuleList([layer])).matrices}
    attention, tokens = layer.self_attn, torch.randn(1, 5, 8)

    def without(*labels: str) -> Tensor:
        fused = attention.in_proj_weight.detach().clone()
        for label in labels:
            view = views[f"0.self_attn.in_proj_weight[{label}]"]
            view.write_(fused, torch.zeros(view.shape))
        state = attention.state_dict() | {"in_proj_weight": fused}
        with torch.no_grad():
            out: Tensor = torch.func.functional_call(attention, state, (tokens,) * 3)[0]
        return out

    assert difference(without("v"), attention.out_proj.bias.detach()) <= UNCHANGED
    assert difference(without("q"), without("q", "k")) <= UNCHANGED
    assert difference(without("q"), without()) >= CHANGED


def test_torch_multihead_attention_with_separate_projections() -> None:
    separate = nn.MultiheadAttention(8, 2, kdim=9, vdim=9)
    model = nn.ModuleList([nn.ModuleDict({"attention": separate})])
    assert [(v.name, v.shape) for v in select_matrices(model).matrices] == [
        ("0.attention.q_proj_weight", (8, 8)),
        ("0.attention.k_proj_weight", (8, 9)),
        ("0.attention.v_proj_weight", (8, 9)),
        ("0.attention.out_proj.weight", (8, 8)),
    ]


def test_every_class_in_the_table_exists() -> None:
    """If transformers renames a class, its row of the table must not become dead unnoticed."""
    models = Path(inspect.getfile(transformers)).parent / "models"
    source = "\n".join(file.read_text(encoding="utf-8") for file in models.glob("*/modeling_*.py"))
    defined = set(re.findall(r"^class (\w+)", source, re.MULTILINE)) | {"MultiheadAttention"}
    in_table = {key.partition(".")[0] for key in LAYOUTS.keys() - FOREIGN_LAYOUTS.keys()}
    assert in_table - defined == set()
