"""Every kind of attention that is accepted: measured, clipped, and measured again.

What lies between a projection and the logits and is not linear in it, such as a bias added later
or a clamp, shows itself here: heads do not end at the threshold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from hf_pss import ConfigurationError
from hf_pss.optim.qk_clip import QKClip
from hf_pss.trainer.attention_maxima import AttentionMaxima

# Relative to the wanted maximum of each head, float32.
CLIPPED_TOLERANCE = 1e-6  # 6.5e-7

LENGTH, VOCABULARY = 12, 32
BASE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**BASE, "num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 8, "pad_token_id": 0}
GPT: dict[str, Any] = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
ENCODER: dict[str, Any] = {**BASE, "pad_token_id": 0}

CLIPPED: list[tuple[str, dict[str, Any]]] = [
    ("GPTBigCodeModel", {**GPT, "multi_query": True}),
    ("GPTBigCodeModel", {**GPT, "multi_query": False}),
    ("Phi3Model", {**GROUPED, "pad_token_id": 0, "eos_token_id": 0}),
    ("PhiModel", BASE),
    ("Gemma2Model", WIDE),
    ("Qwen2Model", GROUPED),
    ("PersimmonModel", {**BASE, "qk_layernorm": False}),
    ("StableLmModel", {**GROUPED, "eos_token_id": 0}),
    ("GptOssModel", {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ("CohereModel", {**GROUPED, "use_qk_norm": False, "eos_token_id": 0}),
    ("GlmModel", WIDE),
    (
        "Llama4TextModel",
        {**WIDE, "intermediate_size_mlp": 24, "num_local_experts": 2, "use_qk_norm": False},
    ),
    (
        "MiMoV2FlashModel",
        {**GROUPED, "head_dim": 8, "v_head_dim": 16, "pad_token_id": 0, "eos_token_id": 0},
    ),
    (
        "OPTModel",
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "ffn_dim": 24,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    (
        "ModernBertModel",
        {**ENCODER, **dict.fromkeys(("bos_token_id", "eos_token_id"), 0)}
        | dict.fromkeys(("cls_token_id", "sep_token_id"), 0),
    ),
    ("BertModel", ENCODER),
    ("BertModel", {**ENCODER, "is_decoder": True}),
    ("RobertaModel", ENCODER),
    (
        "DistilBertModel",
        {"n_layers": 1, "dim": 32, "n_heads": 4, "hidden_dim": 24, "vocab_size": VOCABULARY},
    ),
    ("AlbertModel", {**ENCODER, "embedding_size": 8}),
    ("ElectraModel", {**ENCODER, "embedding_size": 8}),
    (
        "T5EncoderModel",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
        },
    ),
    ("ViTModel", VISION),
    ("CLIPVisionModel", VISION),
    (
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "DbrxModel",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "vocab_size": VOCABULARY,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.05},
            "ffn_config": {
                "ffn_hidden_size": 16,
                "moe_num_experts": 2,
                "moe_top_k": 1,
                "hidden_size": 32,
            },
        },
        "clip_qkv clips",
    ),
    ("OlmoModel", {**GROUPED, "clip_qkv": 0.05, "eos_token_id": 0}, "clip_qkv clips"),
    (
        "ParakeetEncoder",
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "subsampling_conv_channels": 8,
        },
        "it holds bias_u",
    ),
    (
        "FalconModel",
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        "without the AttentionInterface",
    ),
    (
        "DeepseekV3Model",
        {
            **BASE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "not known",
    ),
]


def build(name: str, settings: dict[str, Any]) -> Any:
    """Return a model in training mode that is loud and does not drop anything."""
    kind = getattr(transformers, name)
    config = kind.config_class(**settings)
    if name == "DbrxModel":
        config.attn_config.rope_theta = 1e4  # read by 5.23, which does not set it
    model = kind(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 2 or "bias" in key:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def rows_of(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def measured(model: Any, maxima: AttentionMaxima) -> Tensor:
    maxima.start()
    try:
        model(**rows_of(model))
    finally:
        maxima.stop()
    return maxima.take()[0]


def far_after_the_clip(model: Any) -> float:
    """Clip the first attention; return the largest relative distance of a head from its place."""
    maxima = AttentionMaxima(model)
    before = measured(model, maxima)
    threshold = 0.7 * float(before[before.isfinite()].median())
    clip = QKClip(maxima.attentions[:1], maxima.take, threshold=threshold)
    clip.clip_(before[None])
    wanted = before.clamp(max=threshold)
    assert (before > threshold).any()
    return float(((measured(model, maxima) - wanted) / wanted).abs().max())


# Releases of before have some of these models not, or compute their attention in a way of its own.
IS_OLDER = Version(transformers.__version__) < Version("5.23")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # transformers 5.3's own
@pytest.mark.parametrize(("name", "settings"), CLIPPED)
def test_heads_end_at_the_threshold(name: str, settings: dict[str, Any]) -> None:
    if IS_OLDER and not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        far = far_after_the_clip(build(name, settings))
    except ConfigurationError as error:
        if not IS_OLDER:
            raise
        pytest.skip(f"refused with transformers {transformers.__version__}: {error}")
    assert far <= CLIPPED_TOLERANCE


@pytest.mark.parametrize(("name", "settings", "words"), REFUSED)
def test_what_cannot_be_clipped_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        AttentionMaxima(build(name, settings))


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal a clamp behind the projection leaves heads elsewhere."""
    from hf_pss.models.selection import heads

    model = build("OlmoModel", {**GROUPED, "clip_qkv": 0.5, "eos_token_id": 0})
    monkeypatch.setattr(heads, "_why_unknown", lambda owner, rows: None)
    assert far_after_the_clip(model) > CLIPPED_TOLERANCE
