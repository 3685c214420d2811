from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

# Sizes differ wherever they may, so that a transposed or mis-split matrix has the wrong shape.
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**BASE, **PAD, "num_key_value_heads": 2}
GQA_HEAD = {**GQA, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 40}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
SEQ2SEQ = {
    **PAD,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
LATENT_ATTENTION = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model and its expected matrices: `attention | mlp`, with `a[q,k]` for two parts."""

    name: str
    auto_class: str
    model_type: str
    expected: str
    settings: dict[str, Any] = field(default_factory=dict)
    num_matrices: int = 0

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.settings)
        model: nn.Module = getattr(transformers, self.auto_class).from_config(config)
        return model.eval()

    def expected_names(self) -> dict[str, set[str]]:
        attention, mlp = (
            {part for word in half.split() for part in _parts(word)}
            for half in self.expected.split("|")
        )
        return {role: names for role, names in (("attention", attention), ("mlp", mlp)) if names}


def _parts(word: str) -> list[str]:
    name, _, labels = word.rstrip("]").partition("[")
    return [f"{name}[{label}]" for label in labels.split(",")] if labels else [name]


CAUSAL, MASKED, SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"

QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
QKV_OUT = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"
CROSS = "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj"
ENCODER = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense"
    " | intermediate.dense output.dense"
)
GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj"
LLAMA = f"{QKVO} | {GATED}"
GPT2 = "attn.c_attn[q,k,v] attn.c_proj | mlp.c_fc mlp.c_proj"
NEOX_MLP = "mlp.dense_h_to_4h mlp.dense_4h_to_h"
BLOOM = f"self_attention.query_key_value[q,k,v] self_attention.dense | {NEOX_MLP}"
MOE = "mlp.experts.gate_up_proj[gate,up] mlp.experts.down_proj"
SHARED = "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj"
T5_ATTENTION = " ".join(
    f"layer.{layer}.{name}.{part}"
    for layer, name in ((0, "SelfAttention"), (1, "EncDecAttention"))
    for part in "qkvo"
)
VIT = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj | mlp.fc1 mlp.fc2"
LINEAR_QKVZ = (
    "linear_attn.in_proj_qkvz[q,k,v,z] linear_attn.in_proj_ba[b,a] linear_attn.out_proj"
    " self_attn.q_proj[q,gate] self_attn.k_proj self_attn.v_proj self_attn.o_proj"
)
LINEAR_QKV = (
    "linear_attn.in_proj_qkv[q,k,v] linear_attn.in_proj_z linear_attn.in_proj_b"
    " linear_attn.in_proj_a linear_attn.out_proj"
    " self_attn.q_proj[q,gate] self_attn.k_proj self_attn.v_proj self_attn.o_proj"
)
LATENT = (
    "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa[latent,k_rope]"
    " self_attn.kv_b_proj[k_nope,v] self_attn.o_proj"
)
GRANITE_EXPERTS = (
    "block_sparse_moe.experts.gate_up_proj[gate,up] block_sparse_moe.experts.down_proj"
)

A = Architecture
ARCHITECTURES = [
    # --- decoders with fused query, key and value
    A("gpt2", CAUSAL, "gpt2", GPT2, GPT, 12),
    A(
        "gpt2-cross",
        CAUSAL,
        "gpt2",
        "attn.c_attn[q,k,v] attn.c_proj crossattention.c_attn[k,v] crossattention.q_attn"
        " crossattention.c_proj | mlp.c_fc mlp.c_proj",
        {**GPT, "add_cross_attention": True},
        20,
    ),
    A("openai-gpt", CAUSAL, "openai-gpt", GPT2, GPT, 12),
    A("gpt_bigcode-mqa", CAUSAL, "gpt_bigcode", GPT2, {**GPT, "multi_query": True}, 12),
    A("gpt_bigcode-mha", CAUSAL, "gpt_bigcode", GPT2, {**GPT, "multi_query": False}, 12),
    A(
        "gpt_neox",
        CAUSAL,
        "gpt_neox",
        f"attention.query_key_value[q,k,v] attention.dense | {NEOX_MLP}",
        BASE,
        12,
    ),
    A(
        "codegen",
        CAUSAL,
        "codegen",
        "attn.qkv_proj[q,k,v] attn.out_proj | mlp.fc_in mlp.fc_out",
        {**GPT, "rotary_dim": 4},
        12,
    ),
    A(
        "bloom",
        CAUSAL,
        "bloom",
        BLOOM,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        12,
    ),
    A("falcon-old", CAUSAL, "falcon", BLOOM, {**FALCON, "multi_query": False}, 12),
    A("falcon-mqa", CAUSAL, "falcon", BLOOM, {**FALCON, "multi_query": True}, 12),
    A(
        "falcon-new",
        CAUSAL,
        "falcon",
        BLOOM,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        12,
    ),
    A(
        "mpt",
        CAUSAL,
        "mpt",
        "attn.Wqkv[q,k,v] attn.out_proj | ffn.up_proj ffn.down_proj",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64},
        12,
    ),
    A(
        "dbrx",
        CAUSAL,
        "dbrx",
        "norm_attn_norm.attn.Wqkv[q,k,v] norm_attn_norm.attn.out_proj |",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
        8,
    ),
    A(
        "persimmon",
        CAUSAL,
        "persimmon",
        f"self_attn.query_key_value[q,k,v] self_attn.dense | {NEOX_MLP}",
        {**BASE, **PAD},
        12,
    ),
    A(
        "phi3",
        CAUSAL,
        "phi3",
        "self_attn.qkv_proj[q,k,v] self_attn.o_proj | mlp.gate_up_proj[gate,up] mlp.down_proj",
        GQA,
        14,
    ),
    # --- decoders with one matrix a projection
    A(
        "gpt_neo",
        CAUSAL,
        "gpt_neo",
        "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj"
        " attn.attention.out_proj | mlp.c_fc mlp.c_proj",
        {**BASE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        12,
    ),
    A(
        "gptj",
        CAUSAL,
        "gptj",
        "attn.q_proj attn.k_proj attn.v_proj attn.out_proj | mlp.fc_in mlp.fc_out",
        {**GPT, "rotary_dim": 4},
        12,
    ),
    A(
        "opt",
        CAUSAL,
        "opt",
        f"{QKV_OUT} | fc1 fc2",
        {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16},
        12,
    ),
    A(
        "xglm",
        CAUSAL,
        "xglm",
        f"{QKV_OUT} | fc1 fc2",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": 64},
        12,
    ),
    *(
        A(name, CAUSAL, name, LLAMA, GQA_HEAD, 14)
        for name in (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo"),
            *("olmo2", "granite", "stablelm", "smollm3", "cohere", "seed_oss", "exaone4"),
            *("ernie4_5", "hunyuan_v1_dense"),
        )
    ),
    *(
        A(name, CAUSAL, name, f"{QKVO} | mlp.gate_up_proj[gate,up] mlp.down_proj", GQA_HEAD, 14)
        for name in ("glm", "glm4")
    ),
    *(
        A(name, CAUSAL, name, f"{QKVO} | mlp.up_proj mlp.down_proj", GQA, 12)
        for name in ("nemotron", "arcee", "apertus")
    ),
    A("nanochat", CAUSAL, "nanochat", f"{QKVO} | mlp.fc1 mlp.fc2", GQA, 12),
    A("starcoder2", CAUSAL, "starcoder2", f"{QKVO} | mlp.c_fc mlp.c_proj", GQA, 12),
    A(
        "phi",
        CAUSAL,
        "phi",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense | mlp.fc1 mlp.fc2",
        BASE,
        12,
    ),
    # --- mixtures of experts
    A("mixtral", CAUSAL, "mixtral", f"{QKVO} | {MOE}", {**GQA, **LOCAL_EXPERTS}, 14),
    A("qwen3_moe", CAUSAL, "qwen3_moe", f"{QKVO} | {MOE}", {**GQA_HEAD, **EXPERTS}, 14),
    A("olmoe", CAUSAL, "olmoe", f"{QKVO} | {MOE}", {**GQA, **EXPERTS}, 14),
    A("gpt_oss", CAUSAL, "gpt_oss", f"{QKVO} | {MOE}", {**GQA_HEAD, **LOCAL_EXPERTS}, 14),
    A("qwen2_moe", CAUSAL, "qwen2_moe", f"{QKVO} | {MOE} {SHARED}", {**GQA, **SHARED_EXPERT}, 20),
    A(
        "granitemoe",
        CAUSAL,
        "granitemoe",
        f"{QKVO} | {GRANITE_EXPERTS}",
        {**GQA, **LOCAL_EXPERTS},
        14,
    ),
    A(
        "granitemoeshared",
        CAUSAL,
        "granitemoeshared",
        f"{QKVO} | {GRANITE_EXPERTS} shared_mlp.input_linear[gate,up] shared_mlp.output_linear",
        {**GQA, **LOCAL_EXPERTS, "shared_intermediate_size": 40},
        20,
    ),
    A(
        "llama4_text",
        CAUSAL,
        "llama4_text",
        f"{QKVO} | {GATED} {MOE} {SHARED}".replace("mlp.", "feed_forward."),
        {**GQA_HEAD, **LOCAL_EXPERTS, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
        17,
    ),
    A(
        "jetmoe",
        CAUSAL,
        "jetmoe",
        "self_attention.experts.input_linear self_attention.experts.output_linear"
        " self_attention.kv_proj[k,v] | mlp.input_linear[gate,up] mlp.output_linear",
        {**GQA, **LOCAL_EXPERTS, "kv_channels": 8},
        14,
    ),
    A(
        "deepseek_v3",
        CAUSAL,
        "deepseek_v3",
        f"{LATENT} | {GATED} {MOE} {SHARED.replace('expert', 'experts')}",
        {
            **BASE,
            **EXPERTS,
            **LATENT_ATTENTION,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        23,
    ),
    # --- hybrids: recurrent and convolutional mixers stay out
    A(
        "qwen3_next",
        CAUSAL,
        "qwen3_next",
        f"{LINEAR_QKVZ} | {MOE} {SHARED}",
        {**GQA_HEAD, **SHARED_EXPERT, **LINEAR_ATTENTION},
        24,
    ),
    A(
        "qwen3_5_text",
        CAUSAL,
        "qwen3_5_text",
        f"{LINEAR_QKV} | {GATED}",
        {**GQA_HEAD, **LINEAR_ATTENTION},
        18,
    ),
    A(
        "minimax",
        CAUSAL,
        "minimax",
        f"self_attn.qkv_proj[q,k,v] self_attn.out_proj self_attn.output_gate {QKVO} | {MOE}",
        {
            **GQA_HEAD,
            **LOCAL_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
        },
        15,
    ),
    A(
        "jamba",
        CAUSAL,
        "jamba",
        f"{QKVO} | {GATED} {MOE}".replace("mlp.", "feed_forward."),
        {
            **GQA,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
        10,
    ),
    A(
        "nemotron_h",
        CAUSAL,
        "nemotron_h",
        "mixer.q_proj mixer.k_proj mixer.v_proj mixer.o_proj | mixer.up_proj mixer.down_proj",
        {**GQA_HEAD, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3},
        6,
    ),
    A(
        "lfm2",
        CAUSAL,
        "lfm2",
        f"{QKV_OUT} | feed_forward.w1 feed_forward.w2 feed_forward.w3",
        {**GQA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        10,
    ),
    # --- encoders
    *(
        A(name, MASKED, name, ENCODER, {**BASE, "pad_token_id": 0, "embedding_size": size}, 12)
        for name, size in (("bert", 32), ("roberta", 32), ("xlm-roberta", 32), ("electra", 16))
    ),
    A("roberta-prelayernorm", MASKED, "roberta-prelayernorm", ENCODER, BASE, 12),
    A("bert-classifier", "AutoModelForSequenceClassification", "bert", ENCODER, BASE, 12),
    A(
        "distilbert",
        MASKED,
        "distilbert",
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin | ffn.lin1 ffn.lin2",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
        12,
    ),
    A(
        "albert",
        MASKED,
        "albert",
        "albert_layers.0.attention.query albert_layers.0.attention.key"
        " albert_layers.0.attention.value albert_layers.0.attention.dense"
        " | albert_layers.0.ffn albert_layers.0.ffn_output",
        {**BASE, "embedding_size": 16},
        6,
    ),
    A(
        "deberta",
        MASKED,
        "deberta",
        "attention.self.in_proj[q,k,v] attention.self.pos_proj attention.self.pos_q_proj"
        " attention.output.dense | intermediate.dense output.dense",
        {**BASE, "pos_att_type": ["c2p", "p2c"], "relative_attention": True},
        16,
    ),
    A(
        "deberta-v2",
        MASKED,
        "deberta-v2",
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
        " attention.self.pos_key_proj attention.self.pos_query_proj"
        " attention.output.dense | intermediate.dense output.dense",
        {**BASE, "pos_att_type": ["c2p", "p2c"], "relative_attention": True},
        16,
    ),
    A(
        "modernbert",
        MASKED,
        "modernbert",
        "attn.Wqkv[q,k,v] attn.Wo | mlp.Wi[input,gate] mlp.Wo",
        {**BASE, **PAD},
        14,
    ),
    A(
        "mpnet",
        MASKED,
        "mpnet",
        "attention.attn.q attention.attn.k attention.attn.v attention.attn.o"
        " | intermediate.dense output.dense",
        BASE,
        12,
    ),
    # --- encoder and decoder
    A(
        "t5",
        SEQ,
        "t5",
        f"{T5_ATTENTION} | "
        + " ".join(f"layer.{n}.DenseReluDense.{w}" for n in "12" for w in ("wi", "wo")),
        {**T5, "decoder_start_token_id": 0},
        32,
    ),
    A(
        "mt5",
        SEQ,
        "mt5",
        f"{T5_ATTENTION} | "
        + " ".join(f"layer.{n}.DenseReluDense.{w}" for n in "12" for w in ("wi_0", "wi_1", "wo")),
        {**T5, "decoder_start_token_id": 0},
        36,
    ),
    A("bart", SEQ, "bart", f"{QKV_OUT} {CROSS} | fc1 fc2", SEQ2SEQ, 32),
    A(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        "whisper",
        f"{QKV_OUT} {CROSS} | fc1 fc2",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        32,
    ),
    # --- images and sound
    A("vit", "AutoModelForImageClassification", "vit", VIT, VISION, 12),
    A("dinov2", "AutoModel", "dinov2", VIT, {**VISION, "mlp_ratio": 2}, 12),
    A("beit", "AutoModel", "beit", VIT, VISION, 12),
    A("siglip", "AutoModel", "siglip_vision_model", f"{QKV_OUT} | mlp.fc1 mlp.fc2", VISION, 12),
    A(
        "swinv2",
        "AutoModel",
        "swinv2",
        "blocks.0.attention.self.query blocks.0.attention.self.key blocks.0.attention.self.value"
        " blocks.0.attention.output.dense | blocks.0.intermediate.dense blocks.0.output.dense"
        " downsample.reduction",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [4, 4],
            "window_size": 4,
        },
        13,
    ),
    A(
        "focalnet",
        "AutoModel",
        "focalnet",
        "| layers.0.modulation.projection_in layers.0.modulation.projection_out"
        " layers.0.mlp.fc1 layers.0.mlp.fc2",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1],
            "hidden_sizes": [32],
            "focal_levels": [2],
            "focal_windows": [3],
        },
        4,
    ),
    A("clip-vision", "AutoModel", "clip_vision_model", f"{QKV_OUT} | mlp.fc1 mlp.fc2", VISION, 12),
    A("clip-text", "AutoModel", "clip_text_model", f"{QKV_OUT} | mlp.fc1 mlp.fc2", BASE, 12),
    A(
        "vitdet",
        "AutoModel",
        "vitdet",
        "attention.qkv[q,k,v] attention.proj | mlp.fc1 mlp.fc2",
        {**VISION, "pretrain_image_size": 8},
        12,
    ),
    A(
        "wav2vec2",
        "AutoModel",
        "wav2vec2",
        "attention.q_proj attention.k_proj attention.v_proj attention.out_proj"
        " | feed_forward.intermediate_dense feed_forward.output_dense",
        {
            **BASE,
            "conv_dim": (8, 8),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        12,
    ),
]
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
