"""How the output rows of fused projections are divided among the matrices they hold: one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

__all__ = [
    "FOREIGN_LAYOUTS",
    "LAYOUTS",
    "Parts",
    "class_names",
    "find_layout",
    "looks_fused",
    "stores_inputs_first",
]

Parts: TypeAlias = tuple[tuple[str, int], ...]
"""(label, rows) of each part in stored order; repeats until all output rows are used."""

LayoutRule: TypeAlias = Callable[[nn.Module, int], Parts]
"""(module that owns the projection, its number of output rows) → parts."""

_FUSED_NAME = re.compile(
    r"qkv|query_key_value|c_attn|w_?pack|gate_?up|in_proj_weight|in_proj_ba|to_kv|^kv_proj|kv_[ab]_proj"
    r"|^(?:kv|attn|att_proj|ff_proj|w_?12)$",
    re.IGNORECASE,
)


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's class and its bases, most derived first.

    Bases count because FSDP2 derives a class of its own from the class of every module it shards.
    """
    return tuple(base.__name__ for base in type(module).__mro__)


def find_layout(owner: nn.Module, leaf: str, num_rows: int) -> Parts | None:
    """Return the parts of a fused projection, or None where its layout is not known.

    Args:
        owner: The module whose forward divides the projection's output.
        leaf: Name of the projection inside the owner, such as ``c_attn``.
        num_rows: Output rows of the stored matrix.
    """
    rules = (LAYOUTS.get(f"{name}.{leaf}") for name in class_names(owner))
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


def looks_fused(leaf: str) -> bool:
    """Tell by its name whether a projection is likely to hold several matrices."""
    return _FUSED_NAME.search(leaf) is not None


def stores_inputs_first(module: nn.Module) -> bool:
    """Tell whether a module stores its matrices as (in, out)."""
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
    # Four groups (`mp_num`), in this order: those of the TPU cores that CodeGen was trained on.
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
        # TinyViT's and EfficientFormer's classes of the same name have one run of rows a head.
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
    # Only a gated activation halves its input.
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

# Of packages that are not installed here, so that no test sees a class renamed. Read in the forward
# of timm 1.0.31, diffusers 0.42.1, litgpt 0.5.13 (and 0.5.3, whose projection is `attn`), ai2-olmo
# 0.6.0, ai2-olmo-core 3.0.0, the DINOv2, xFormers and nanoGPT repositories, and InternLM2's code.
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

# Class.projection → rule, each read in the forward of transformers 5.23 or torch 2.13.
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
