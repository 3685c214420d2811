"""Models of other libraries: small modules with their names, and the real ones if installed.

The look-alikes have the class and attribute names of timm, DiT, litgpt, OLMo, DINOv2, InternLM2 and
sentence-transformers, because the tests concern the reading of those names.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import BY_NAME
from torch import Tensor, nn

from hf_pss.models.selection import RowPattern, Selection, select_matrices
from hf_pss.optim import matrix_groups

LITGPT = SimpleNamespace(n_head=4, n_query_groups=2, head_size=8)
SWIGLU = SimpleNamespace(output_multiplier=0.5)
GELU = SimpleNamespace(output_multiplier=1.0)
UNKNOWN = "; fused, layout unknown: kept as one matrix"


def module_of(class_name: str, attributes: dict[str, Any], **children: nn.Module) -> nn.Module:
    """Return a module whose class has this name; a name with a colon has a base: `A:B`."""
    bases: tuple[type, ...] = (nn.Module,)
    for name in reversed(class_name.split(":")):
        bases = (type(name, bases, {}),)
    module: nn.Module = bases[0]()
    for key, value in {**attributes, **children}.items():
        setattr(module, key, value)
    return module


def rows_of(class_name: str, leaf: str, attributes: dict[str, Any], num_rows: int) -> Selection:
    """Return the selection of two blocks that hold one projection from 32 inputs each."""
    owners = [
        module_of(class_name, attributes, **{leaf: nn.Linear(32, num_rows)}) for _ in range(2)
    ]
    return select_matrices(nn.ModuleList([nn.ModuleDict({"part": owner}) for owner in owners]))


QKV = "q 32 | k 32 | v 32"
HEADS = {"num_heads": 4}


@pytest.mark.parametrize(
    ("class_name", "leaf", "attributes", "layout"),
    [
        ("Attention", "qkv", HEADS, f"[{QKV}]"),
        ("MemEffAttention", "qkv", {}, f"[{QKV}]"),
        ("MyAttention:Attention", "qkv", HEADS, f"[{QKV}]"),
        ("WindowAttention", "qkv", {}, f"[{QKV}]"),
        ("EvaAttention", "qkv", {}, f"[{QKV}]"),
        ("BarkSelfAttention", "att_proj", {}, f"[{QKV}]"),
        ("CausalSelfAttention", "qkv", {"config": LITGPT}, "[q 32 | k 16 | v 16]"),
        ("CausalSelfAttention", "attn", {"config": LITGPT}, "2 × [q 16 | k 8 | v 8]"),
        (
            "InternLM2Attention",
            "wqkv",
            {"head_dim": 8, "num_key_value_groups": 2},
            "2 × [q 16 | k 8 | v 8]",
        ),
        ("OLMoSequentialBlock", "att_proj", {"fused_dims": (32, 8, 8)}, "[q 32 | k 8 | v 8]"),
        ("OLMoLlamaBlock:OLMoBlock", "ff_proj", {"act": SWIGLU}, "[up 48 | gate 48]"),
        ("FusedAttentionV2", "w_qkv", {"q_dim": 32, "kv_dim": 8}, "[q 32 | k 8 | v 8]"),
        ("SwiGLUFFN", "w12", {}, "[gate 48 | up 48]"),
        ("SwiGLUFFNFused:SwiGLU", "w12", {}, "[gate 48 | up 48]"),
        ("GluMlp", "fc1", {"gate_last": True}, "[up 48 | gate 48]"),
        ("GluMlp", "fc1", {"gate_last": False}, "[gate 48 | up 48]"),
        ("GEGLU", "proj", {}, "[up 48 | gate 48]"),
        ("Flux2FeedForward", "linear_in", {}, "[gate 48 | up 48]"),
    ],
)
def test_a_fused_projection_is_divided(
    class_name: str, leaf: str, attributes: dict[str, Any], layout: str
) -> None:
    times, _, parts = layout.rpartition("× ")
    sizes = [int(part.split()[1]) for part in parts.strip("[]").split(" | ")]
    num_rows = sum(sizes) * int(times or 1)
    selection = rows_of(class_name, leaf, attributes, num_rows)
    expected = [f"Linear; {part.split()[0]} of {layout}" for part in parts.strip("[]").split(" | ")]
    assert [m.reason for m in selection.matrices] == expected * 2
    assert sum(m.shape[0] for m in selection.matrices) == 2 * num_rows


@pytest.mark.parametrize(
    ("class_name", "leaf", "attributes"),
    [
        ("Attention", "qkv", {}),
        # TinyViT, whose class has the same name: rows lie head by head.
        ("Attention", "qkv", {"num_heads": 4, "key_dim": 8}),
        ("SelfAttention", "qkv", HEADS),
        ("CausalSelfAttention", "qkv", {}),
        ("CausalSelfAttention", "attn", {"config": SimpleNamespace(n_head=4)}),
        ("InternLM2Attention", "wqkv", {"head_dim": 8}),
        ("SelfAttention", "linear_qkv", {}),
        ("Olmo", "att_proj", {}),
        ("OLMoSequentialBlock", "att_proj", {}),
        ("OLMoSequentialBlock:OLMoBlock", "ff_proj", {"act": GELU}),
        ("Olmo", "ff_proj", {}),
        ("Custom", "w12", {}),
        ("Attention", "kv", HEADS),
    ],
)
def test_a_fused_projection_of_unknown_layout_is_named_as_whole(
    class_name: str, leaf: str, attributes: dict[str, Any]
) -> None:
    selection = rows_of(class_name, leaf, attributes, 96)
    assert [m.reason for m in selection.matrices] == [f"Linear{UNKNOWN}"] * 2


@pytest.mark.parametrize("leaf", ["qkv", "att_proj", "linear_qkv", "wqkv"])
def test_a_projection_to_queries_keys_and_values_is_attention_without_a_module_of_its_own(
    leaf: str,
) -> None:
    assert {m.role for m in rows_of("Block", leaf, {}, 96).matrices} == {"attention"}


class AdaLayerNormZero(nn.Module):
    """The norm of a block in diffusers holds its embedder and the layer that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        embedders = {"linear_1": nn.Linear(16, 32), "linear_2": nn.Linear(32, 32)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedders)})
        self.linear = nn.Linear(32, 192)


def dit() -> nn.Module:
    """DiT of two origins: diffusers' first block, and one as in the paper's own code."""
    attention = {name: nn.Linear(32, 32) for name in ("to_q", "to_k", "to_v")}
    mlp = {"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)}
    first = {"norm1": AdaLayerNormZero(), "attn1": nn.ModuleDict(attention)}
    own = {
        "attn": module_of("Attention", HEADS, qkv=nn.Linear(32, 96)),
        "mlp": nn.ModuleDict(mlp),
        "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(32, 192)),
    }
    blocks = nn.ModuleList([nn.ModuleDict(first), nn.ModuleDict(own)])
    embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32))})
    return nn.ModuleDict({"t_embedder": embedder, "blocks": blocks})


def test_the_modulation_and_embedders_of_a_diffusion_transformer_are_left_alone() -> None:
    selection = select_matrices(dit())
    assert [m.name for m in selection.matrices] == [
        *(f"blocks.0.attn1.{name}.weight" for name in ("to_q", "to_k", "to_v")),
        *(f"blocks.1.attn.qkv.weight[{label}]" for label in "qkv"),
        *(f"blocks.1.mlp.{name}.weight" for name in ("fc1", "fc2")),
    ]
    assert {e.parameter_name: e.reason for e in selection.exclusions if len(e.shape) > 1} == {
        "t_embedder.mlp.0.weight": "outside the repeated blocks",
        "t_embedder.mlp.1.weight": "outside the repeated blocks",
        "blocks.0.norm1.emb.timestep_embedder.linear_1.weight": "timestep, position or other"
        " embedder",
        "blocks.0.norm1.emb.timestep_embedder.linear_2.weight": "timestep, position or other"
        " embedder",
        "blocks.0.norm1.linear.weight": "modulation or conditioning layer",
        "blocks.1.adaLN_modulation.1.weight": "modulation or conditioning layer",
    }


def test_modulation_is_moved_by_adamw() -> None:
    model = dit()
    muon = next(g for g in matrix_groups(model, algo="muon") if g["algo"] == "muon")
    held = {id(parameter) for parameter in muon["params"]}
    assert id(model.get_parameter("blocks.1.mlp.fc1.weight")) in held
    assert id(model.get_parameter("blocks.1.adaLN_modulation.1.weight")) not in held


def test_an_include_pattern_brings_modulation_back() -> None:
    found = select_matrices(dit(), include=["adaLN_modulation"]).matrices
    assert found[-1].name == "blocks.1.adaLN_modulation.1.weight"
    assert found[-1].reason == "included by 'adaLN_modulation': Linear"


@pytest.mark.parametrize("inner", ["auto_model", "model"])
def test_a_sentence_transformer(inner: str) -> None:
    """Two Dense layers of one class, as in EmbeddingGemma, do not form a stack of blocks."""
    bert = BY_NAME["bert-classifier"].build().get_submodule("bert")
    dense = [module_of("Dense", {}, linear=nn.Linear(32, 32)) for _ in range(2)]
    for module in dense[1:]:
        module.__class__ = type(dense[0])
    pooling = module_of("Pooling", {})
    model = nn.Sequential(module_of("Transformer", {}, **{inner: bert}), pooling, *dense)
    selection = select_matrices(model)
    assert {m.block for m in selection.matrices} == {f"0.{inner}.encoder.layer.{i}" for i in (0, 1)}
    assert len(selection.matrices) == 12
    outside = {e.parameter_name: e.reason for e in selection.exclusions}
    assert outside["2.linear.weight"] == "outside the repeated blocks"


def values_reaching(
    projection: nn.Linear, rows: RowPattern, consumer: nn.Module, run: Any
) -> float:
    """Return the largest input of `consumer` when some output rows of `projection` give 0."""
    seen: list[Tensor] = []

    def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        torch.unflatten(output, -1, (-1, rows.period))[..., rows.start : rows.start + rows.size] = (
            0.0
        )
        return output

    handles = [
        projection.register_forward_hook(silence),
        consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return float(seen[0].abs().max())


def check_values_by_forward(model: nn.Module, fused: str, out: str, run: Any) -> None:
    """The output projection gets zeros without values, and other inputs without keys."""
    found = {
        m.name.rpartition("[")[2][:-1]: m.rows
        for m in select_matrices(model).matrices
        if m.parameter_name == f"{fused}.weight"
    }
    assert found.keys() == set("qkv")
    projection, consumer = model.get_submodule(fused), model.get_submodule(out)
    assert isinstance(projection, nn.Linear)
    assert found["v"] is not None
    assert found["k"] is not None
    assert values_reaching(projection, found["v"], consumer, run) == 0.0
    assert values_reaching(projection, found["k"], consumer, run) > 0.0


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3).eval()
    image = torch.randn(1, 3, 224, 224)
    check_values_by_forward(model, "blocks.0.attn.qkv", "blocks.0.attn.proj", lambda: model(image))
    assert len(select_matrices(model).matrices) == 12


def test_litgpt() -> None:
    litgpt = pytest.importorskip("litgpt.model")
    config = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_query_groups": 2, "block_size": 8}
    model = litgpt.GPT(litgpt.Config(**config, padded_vocab_size=64)).eval()
    tokens = torch.arange(6)[None]
    check_values_by_forward(
        model, "transformer.h.0.attn.qkv", "transformer.h.0.attn.proj", lambda: model(tokens)
    )


def test_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes)
    selection = select_matrices(model)
    assert len(selection.matrices) == 12
    why = {e.parameter_name: e.reason for e in selection.exclusions}
    block = "transformer_blocks.0.norm1"
    assert why[f"{block}.linear.weight"] == "modulation or conditioning layer"
    assert why[f"{block}.emb.timestep_embedder.linear_1.weight"].endswith("embedder")
