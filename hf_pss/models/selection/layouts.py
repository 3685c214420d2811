"""The layouts of fused projections: which of their output rows belong to which matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RowPattern:
    """The output rows r with ``start <= r mod period < start + size``.

    Every fused layout in this file has this form. GPT-2's [Q|K|V] has one period of
    all rows, GPT-NeoX has one period per head, and interleaved gate and up projections
    have periods of two rows.

    Attributes:
        start: The first row of the part within a period.
        size: The number of rows of the part in each period.
        period: The number of rows after which the pattern repeats. It divides the number
            of stored output rows.
    """

    start: int
    size: int
    period: int

    def stored_rows(self, num_rows: int, device: torch.device | None = None) -> Tensor:
        """Return the stored output row of each of the part's rows, (num_rows,), int64."""
        row = torch.arange(num_rows, device=device)
        return row // self.size * self.period + self.start + row % self.size


Parts: TypeAlias = tuple[tuple[str, int], ...]
"""(label, rows) of each part in stored order. The sequence repeats until the rows end."""

LayoutRule: TypeAlias = Callable[[Any, int], Parts]
"""Maps (owner of the projection, its number of output rows) to parts. A rule reads attributes of
the owner. The owner is a module, or a namespace with the numbers of a config."""

_FUSED_NAME = re.compile(
    r"qkv|query_key_value|c_attn|w_?pack|gate_?up|in_proj_weight|in_proj_ba|to_kv|^kv_proj|kv_[ab]_proj"
    r"|^(?:kv|attn|att_proj|ff_proj|w_?12)$",
    re.IGNORECASE,
)


# The tables below serve checkpoints, where there is no module to inspect.
_THIRDS = {"in_proj_weight", "qkv", "Wqkv", "c_attn", "qkv_linear"}
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_LATENT_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_LINEAR_ATTENTION = {
    "head_k_dim": "linear_key_head_dim",
    "head_v_dim": "linear_value_head_dim",
    "num_k_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
}


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's class and its bases, most derived first.

    The bases count, because FSDP2 replaces the class of every module that it
    shards by a derived class.
    """
    return tuple(base.__name__ for base in type(module).__mro__)


def find_layout(owner: nn.Module, leaf: str, num_rows: int) -> Parts | None:
    """Return the parts of a fused projection, or None if its layout is unknown.

    Args:
        owner: The module whose forward divides the projection's output.
        leaf: The name of the projection inside the owner, such as ``c_attn``.
        num_rows: The number of output rows of the stored matrix.
    """
    return _divided(class_names(owner), owner, leaf, num_rows)


def _divided(classes: Sequence[str], owner: object, leaf: str, num_rows: int) -> Parts | None:
    rules = (LAYOUTS.get(f"{name}.{leaf}") for name in classes)
    rule = next((r for r in rules if r is not None), None)
    if rule is None and leaf == "gate_up_proj":
        rule = _declared_experts
    if rule is None:
        return None
    try:
        parts = rule(owner, num_rows)
    except LookupError:
        return None
    sizes = [size for _, size in parts]
    return parts if min(sizes) > 0 and num_rows % sum(sizes) == 0 else None


def layout_by_config(
    leaf: str,
    num_rows: int,
    num_columns: int,
    config: Mapping[str, Any],
    *,
    is_cross_attention: bool = False,
) -> Parts | None:
    """Return the parts of a fused 2-D projection without reading a module.

    The rules are those of `find_layout` with the classes of the config's ``model_type``. For other
    models the name and the shape decide: if there are three times as many outputs as inputs, the
    parts are q, k and v.

    Args:
        leaf: The name of the projection, such as ``c_attn``.
        num_rows: The number of output rows of the stored matrix.
        num_columns: The number of its inputs.
        config: Parsed ``config.json``, which is not trusted. Empty if there is none.
        is_cross_attention: Whether there is a separate projection for queries.

    >>> layout_by_config("query_key_value", 12, 4, {"model_type": "bloom", "n_head": 2})
    (('q', 2), ('k', 2), ('v', 2))
    """
    classes = _CLASSES.get(str(config.get("model_type")), ())
    if any(f"{name}.{leaf}" in LAYOUTS for name in classes):
        numbers = _numbers(config, num_columns, is_cross_attention)
        parts = _divided(classes, numbers, leaf, num_rows)
        is_attention = parts is not None and {label for label, _ in parts} == {"q", "k", "v"}
        return parts if not is_attention or num_rows in _attention_rows(numbers) else None
    if leaf in _THIRDS and num_rows == 3 * num_columns:
        return _equal("q", "k", "v")(None, num_rows)
    if leaf == "gate_up_proj" and num_rows % 2 == 0:
        return _equal("gate", "up")(None, num_rows)
    return None


def _numbers(
    config: Mapping[str, Any], num_columns: int, is_cross_attention: bool
) -> SimpleNamespace:
    """Return a config's numbers under the names that modules use for them."""

    def number(*names: str, default: int | None = None) -> int | None:
        values = (config.get(name) for name in names)
        return next((v for v in values if type(v) is int and v > 0), default)

    heads = number("num_attention_heads", "n_head", "n_heads")
    width = number("head_dim", "attention_head_size")
    if width is None and heads is not None and num_columns % heads == 0:
        width = num_columns // heads
    groups = number("num_key_value_heads", "num_kv_heads", default=heads)
    found = {
        "num_heads": heads,
        "num_kv_heads": groups,
        "num_key_value_heads": groups,
        **dict.fromkeys(("head_dim", "head_size", "attention_head_size"), width),
        "embed_dim": num_columns,
        "is_cross_attention": is_cross_attention,
        "new_decoder_architecture": config.get("new_decoder_architecture") is True,
        "multi_query": config.get("multi_query", True) is True,
        **{name: number(name) for name in _LATENT_WIDTHS},
        **{own: number(name) for own, name in _LINEAR_ATTENTION.items()},
    }
    for own in ("key", "value"):
        sizes = number(f"linear_num_{own}_heads"), number(f"linear_{own}_head_dim")
        found[f"{own}_dim"] = sizes[0] * sizes[1] if sizes[0] and sizes[1] else None
    return SimpleNamespace(**found)


def _attention_rows(numbers: SimpleNamespace) -> set[int]:
    """Return the total row counts that q, k and v can have.

    They serve to reject configs that do not match the weights.
    """
    heads, groups, width = numbers.num_heads, numbers.num_kv_heads, numbers.head_dim
    found = {3 * numbers.embed_dim}
    if heads and width:
        found |= {width * (heads + 2 * n) for n in (heads, groups, 1)}
    if numbers.key_dim and numbers.value_dim:
        found.add(2 * numbers.key_dim + numbers.value_dim)
    return found


def looks_fused(leaf: str) -> bool:
    """Return whether a projection seems to hold several matrices, judged by its name."""
    return _FUSED_NAME.search(leaf) is not None


def config_stores_inputs_first(
    model_type: str | None, fused_shapes: Sequence[tuple[int, ...]]
) -> bool:
    """Return whether a checkpoint stores the leaves in `CONV1D_LEAVES` as (in, out).

    Args:
        model_type: The ``model_type`` of the config, or None if there is none.
        fused_shapes: The stored shapes of the 2-D tensors named ``c_attn``. Such a projection makes
            three outputs from one input, so its long side is the output side.
    """
    if model_type in _CONV1D_TYPES:
        return True
    return bool(fused_shapes) and all(3 * shape[0] == shape[1] for shape in fused_shapes)


def row_patterns(parts: Parts) -> list[tuple[str, RowPattern]]:
    """Return the rows of each part, by its label, in stored order."""
    period, start, patterns = sum(size for _, size in parts), 0, []
    for label, size in parts:
        patterns.append((label, RowPattern(start, size, period)))
        start += size
    return patterns


def stores_inputs_first(module: nn.Module) -> bool:
    """Return whether a module stores its matrices as (in, out)."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    return not {"Conv1D", "Llama4TextExperts"}.isdisjoint(class_names(module))


def _number(owner: Any, name: str) -> int:
    value = getattr(owner, name, None)
    if not isinstance(value, int):
        raise LookupError(name)
    return value


def _equal(*labels: str) -> LayoutRule:
    return lambda owner, rows: tuple((label, rows // len(labels)) for label in labels)


def _per_head(*labels: str, width: str = "head_dim") -> LayoutRule:
    return lambda owner, rows: tuple((label, _number(owner, width)) for label in labels)


def _widths(**attributes: str) -> LayoutRule:
    return lambda owner, rows: tuple((k, _number(owner, a)) for k, a in attributes.items())


def _gpt2(owner: nn.Module, rows: int) -> Parts:
    labels = ("k", "v") if _number(owner, "is_cross_attention") else ("q", "k", "v")
    return _equal(*labels)(owner, rows)


def _grouped_query(owner: nn.Module, rows: int) -> Parts:
    kv = _number(owner, "num_key_value_heads") * _number(owner, "head_dim")
    return ("q", rows - 2 * kv), ("k", kv), ("v", kv)


def _falcon(owner: nn.Module, rows: int) -> Parts:
    d, heads = _number(owner, "head_dim"), _number(owner, "num_heads")
    if _number(owner, "new_decoder_architecture"):
        return ("q", heads // _number(owner, "num_kv_heads") * d), ("k", d), ("v", d)
    return ("q", heads * d if _number(owner, "multi_query") else d), ("k", d), ("v", d)


def _gpt_bigcode(owner: nn.Module, rows: int) -> Parts:
    d, embed = _number(owner, "head_dim"), _number(owner, "embed_dim")
    if _number(owner, "is_cross_attention"):
        raise LookupError("cross attention")
    return ("q", embed if _number(owner, "multi_query") else d), ("k", d), ("v", d)


def _codegen(owner: nn.Module, rows: int) -> Parts:
    # Four groups (`mp_num`) in this order, one for each TPU core that CodeGen was trained on.
    return _equal("q", "v", "k")(owner, rows // 4)


def _qwen3_next_qkvz(owner: nn.Module, rows: int) -> Parts:
    key, heads = _number(owner, "head_k_dim"), _number(owner, "num_k_heads")
    value = _number(owner, "head_v_dim") * _number(owner, "num_v_heads") // heads
    return ("q", key), ("k", key), ("v", value), ("z", value)


def _qwen3_next_ba(owner: nn.Module, rows: int) -> Parts:
    each = _number(owner, "num_v_heads") // _number(owner, "num_k_heads")
    return ("b", each), ("a", each)


def _declared_experts(owner: nn.Module, rows: int) -> Parts:
    each = rows // 2 if _number(owner, "is_concatenated") else 1
    return ("gate", each), ("up", each)


def _timm_attention(owner: nn.Module, rows: int) -> Parts:
    _number(owner, "num_heads")
    if getattr(owner, "key_dim", None) is not None:
        # The classes of this name in TinyViT and EfficientFormer store the rows head by head.
        raise LookupError("key_dim")
    return _equal("q", "k", "v")(owner, rows)


def _litgpt(owner: nn.Module, rows: int) -> Parts:
    heads, groups, size = _litgpt_heads(owner)
    return ("q", heads * size), ("k", groups * size), ("v", groups * size)


def _litgpt_by_group(owner: nn.Module, rows: int) -> Parts:
    heads, groups, size = _litgpt_heads(owner)
    return ("q", heads // groups * size), ("k", size), ("v", size)


def _litgpt_heads(owner: Any) -> tuple[int, int, int]:
    config = getattr(owner, "config", None)
    heads, groups = _number(config, "n_head"), _number(config, "n_query_groups")
    return heads, groups, _number(config, "head_size")


def _internlm2(owner: nn.Module, rows: int) -> Parts:
    d = _number(owner, "head_dim")
    return ("q", _number(owner, "num_key_value_groups") * d), ("k", d), ("v", d)


def _olmo_attention(owner: Any, rows: int) -> Parts:
    dims = getattr(owner, "fused_dims", ())
    if len(dims) != 3:
        raise LookupError("fused_dims")
    return tuple(zip("qkv", dims, strict=True))


def _olmo_mlp(owner: Any, rows: int) -> Parts:
    # Only a gated activation halves the size of its input.
    if getattr(getattr(owner, "act", None), "output_multiplier", None) != 0.5:
        raise LookupError("act.output_multiplier")
    return _equal("up", "gate")(owner, rows)


def _glu_mlp(owner: nn.Module, rows: int) -> Parts:
    labels = ("up", "gate") if _number(owner, "gate_last") else ("gate", "up")
    return _equal(*labels)(owner, rows)


def _keys(classes: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{name}.{leaf}" for name in classes.split())


_VISION_QKV = """
    BlipAttention Blip2Attention InstructBlipAttention InstructBlipVideoAttention
    VisionAttention Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Qwen3VLMoeVisionAttention
    Qwen3_5VisionAttention Qwen3_5MoeVisionAttention Qwen3OmniMoeVisionAttention
    Glm4vVisionAttention Glm4vMoeVisionAttention GlmOcrVisionAttention GlmImageVisionAttention
    Ernie4_5_VLMoeVisionAttention SamVisionAttention SamHQVisionAttention
    Sam2MultiScaleAttention SegGptAttention GotOcr2VisionAttention VitDetAttention
    HieraMaskUnitAttention MgpstrAttention TimesformerSelfAttention
    Florence2VisionChannelAttention Florence2VisionWindowAttention
"""
_LATENT_ATTENTION = """
    DeepseekV2Attention DeepseekV3Attention DeepseekV32Attention Glm4MoeLiteAttention
    GlmMoeDsaAttention KimiLinearAttention LongcatFlashMLA MiniCPM3Attention Mistral4Attention
    YoutuAttention
"""
_GATE_UP_MLP = """
    Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmOcrTextMLP GlmImageTextMLP DiaMLP
    Llama4TextExperts
"""
_TIMM_QKV = """
    AttentionRope ChannelAttention ChannelAttentionV2 CrossCovarianceAttn DiffAttention EvaAttention
    FactorAttnConvRelPosEnc LocallyGroupedAttn MHSA MaskUnitAttention MultiScaleAttention
    RelPosAttention TalkingHeadAttn WindowAttention WindowMultiHeadAttention XCA
"""

# Classes of packages that the tests do not install, so no test notices a new name. The source is
# the forward of timm 1.0.31, diffusers 0.42.1, litgpt 0.5.13 (and 0.5.3, where the projection is
# `attn`), ai2-olmo 0.6.0, ai2-olmo-core 3.0.0, the DINOv2, xFormers and nanoGPT repositories, and
# InternLM2's code.
FOREIGN_LAYOUTS: Mapping[str, LayoutRule] = {
    "CausalSelfAttention.c_attn": _equal("q", "k", "v"),
    "CausalSelfAttention.qkv": _litgpt,
    "CausalSelfAttention.attn": _litgpt_by_group,
    "InternLM2Attention.wqkv": _internlm2,
    "OLMoSequentialBlock.att_proj": _olmo_attention,
    "OLMoBlock.ff_proj": _olmo_mlp,
    "FusedAttentionV2.w_qkv": _widths(q="q_dim", k="kv_dim", v="kv_dim"),
    "Attention.qkv": _timm_attention,
    "MemEffAttention.qkv": _equal("q", "k", "v"),
    **dict.fromkeys(_keys(_TIMM_QKV, "qkv"), _equal("q", "k", "v")),
    "GluMlp.fc1": _glu_mlp,
    "Flux2FeedForward.linear_in": _equal("gate", "up"),
    **dict.fromkeys(_keys("SwiGLUFFN SwiGLUFFNFused SwiGLU", "w12"), _equal("gate", "up")),
    **dict.fromkeys(_keys("GEGLU SwiGLU", "proj"), _equal("up", "gate")),
}

# Class.projection → rule, from the forward of transformers 5.23 or torch 2.13. For checkpoints,
# `_CLASSES` gives the class names.
LAYOUTS: Mapping[str, LayoutRule] = {
    "MultiheadAttention.in_proj_weight": _equal("q", "k", "v"),
    **FOREIGN_LAYOUTS,
    "GPT2Attention.c_attn": _gpt2,
    "DecisionTransformerGPT2Attention.c_attn": _gpt2,
    "ImageGPTAttention.c_attn": _gpt2,
    "Attention.c_attn": _equal("q", "k", "v"),
    "GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "GPTNeoXAttention.query_key_value": _per_head("q", "k", "v", width="head_size"),
    "GPTNeoXJapaneseAttention.query_key_value": _per_head("q", "k", "v", width="head_size"),
    "BloomAttention.query_key_value": _per_head("q", "k", "v"),
    "PersimmonAttention.query_key_value": _per_head("q", "k", "v"),
    "FalconAttention.query_key_value": _falcon,
    "CodeGenAttention.qkv_proj": _codegen,
    "MptAttention.Wqkv": _equal("q", "k", "v"),
    "DbrxAttention.Wqkv": _grouped_query,
    "BarkSelfAttention.att_proj": _equal("q", "k", "v"),
    "ModernBertAttention.Wqkv": _equal("q", "k", "v"),
    "ModernBertMLP.Wi": _equal("input", "gate"),
    "ModernBertDecoderMLP.Wi": _equal("input", "gate"),
    "Phi3Attention.qkv_proj": _grouped_query,
    "Phi4MultimodalAttention.qkv_proj": _grouped_query,
    "MiniMaxLightningAttention.qkv_proj": _per_head("q", "k", "v"),
    "DisentangledSelfAttention.in_proj": _per_head("q", "k", "v", width="attention_head_size"),
    "LayoutLMv2SelfAttention.qkv_linear": _equal("q", "k", "v"),
    "JetMoeAttention.kv_proj": _equal("k", "v"),
    "JetMoeMoE.input_linear": _equal("gate", "up"),
    "GraniteMoeSharedMLP.input_linear": _equal("gate", "up"),
    "GraniteMoeHybridMLP.input_linear": _equal("gate", "up"),
    "Qwen3NextAttention.q_proj": _per_head("q", "gate"),
    "Qwen3_5Attention.q_proj": _per_head("q", "gate"),
    "Qwen3_5MoeAttention.q_proj": _per_head("q", "gate"),
    "Qwen3NextGatedDeltaNet.in_proj_qkvz": _qwen3_next_qkvz,
    "Qwen3NextGatedDeltaNet.in_proj_ba": _qwen3_next_ba,
    "Qwen3_5GatedDeltaNet.in_proj_qkv": _widths(q="key_dim", k="key_dim", v="value_dim"),
    "Qwen3_5MoeGatedDeltaNet.in_proj_qkv": _widths(q="key_dim", k="key_dim", v="value_dim"),
    **dict.fromkeys(_keys(_VISION_QKV, "qkv"), _equal("q", "k", "v")),
    **dict.fromkeys(_keys(_GATE_UP_MLP, "gate_up_proj"), _equal("gate", "up")),
    **dict.fromkeys(
        _keys(_LATENT_ATTENTION, "kv_a_proj_with_mqa"),
        _widths(latent="kv_lora_rank", k_rope="qk_rope_head_dim"),
    ),
    **dict.fromkeys(
        _keys(_LATENT_ATTENTION, "kv_b_proj"), _widths(k_nope="qk_nope_head_dim", v="v_head_dim")
    ),
}

# ``model_type`` of a config → the classes that own its fused projections.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("GPT2Attention",),
    "decision_transformer": ("DecisionTransformerGPT2Attention",),
    "imagegpt": ("ImageGPTAttention",),
    "gpt_bigcode": ("GPTBigCodeAttention",),
    "gpt_neox": ("GPTNeoXAttention",),
    "gpt_neox_japanese": ("GPTNeoXJapaneseAttention",),
    "bloom": ("BloomAttention",),
    "persimmon": ("PersimmonAttention",),
    "falcon": ("FalconAttention",),
    "codegen": ("CodeGenAttention",),
    "dbrx": ("DbrxAttention",),
    "modernbert": ("ModernBertAttention", "ModernBertMLP"),
    "modernbert-decoder": ("ModernBertDecoderMLP",),
    "phi3": ("Phi3Attention", "Phi3MLP"),
    "phi4_multimodal": ("Phi4MultimodalAttention", "Phi4MultimodalMLP"),
    "deberta": ("DisentangledSelfAttention",),
    "jetmoe": ("JetMoeAttention",),
    "granitemoeshared": ("GraniteMoeSharedMLP",),
    "granitemoehybrid": ("GraniteMoeHybridMLP",),
    "qwen3_next": ("Qwen3NextAttention", "Qwen3NextGatedDeltaNet"),
    "qwen3_5_text": ("Qwen3_5Attention", "Qwen3_5GatedDeltaNet"),
    "deepseek_v2": ("DeepseekV2Attention",),
    "deepseek_v3": ("DeepseekV3Attention",),
}
