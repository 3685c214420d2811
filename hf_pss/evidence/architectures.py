"""The model families that a recipe can train, all with the same sizes and without dropout.

Without dropout a step draws no random number, so twins differ by their guard alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

DIGITS_SIDE = 8
"""Height and width in pixels of the images that ``vit`` classifies."""
NUM_DIGITS = 10


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes that all families have in common."""

    num_layers: int
    width: int
    num_heads: int
    context_length: int
    vocab_size: int

    @property
    def gated_width(self) -> int:
        """Inner width of a gated MLP: 8/3 of the width, rounded to a multiple of 8.

        A gated MLP has three matrices. At this width it has as many parameters as GPT-2's MLP,
        which has two matrices and the inner width 4 × width.
        """
        return 8 * round(self.width / 3)


def _gpt(sizes: ModelSizes) -> dict[str, Any]:
    return {
        "n_layer": sizes.num_layers,
        "n_embd": sizes.width,
        "n_head": sizes.num_heads,
        "n_positions": sizes.context_length,
        "vocab_size": sizes.vocab_size,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _stack(sizes: ModelSizes) -> dict[str, Any]:
    return {
        "num_hidden_layers": sizes.num_layers,
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.num_heads,
    }


def _gated(sizes: ModelSizes) -> dict[str, Any]:
    return _stack(sizes) | {
        "num_key_value_heads": sizes.num_heads,
        "head_dim": sizes.width // sizes.num_heads,
        "intermediate_size": sizes.gated_width,
        "max_position_embeddings": sizes.context_length,
        "vocab_size": sizes.vocab_size,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _gpt2(sizes: ModelSizes) -> PreTrainedModel:
    config = GPT2Config(**_gpt(sizes), bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config)


def _post_ln(sizes: ModelSizes) -> PreTrainedModel:
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**_gpt(sizes)))


def _llama(sizes: ModelSizes) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_gated(sizes)))


def _llama_untied(sizes: ModelSizes) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_gated(sizes) | {"tie_word_embeddings": False}))


def _qwen3(sizes: ModelSizes) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_gated(sizes)))


def _moe(sizes: ModelSizes) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_gated(sizes), **experts))


def _bert(sizes: ModelSizes) -> PreTrainedModel:
    config = BertConfig(
        **_stack(sizes),
        intermediate_size=4 * sizes.width,
        max_position_embeddings=sizes.context_length,
        vocab_size=sizes.vocab_size + 1,  # the mask token
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def _vit(sizes: ModelSizes) -> PreTrainedModel:
    config = ViTConfig(
        **_stack(sizes),
        intermediate_size=4 * sizes.width,
        image_size=DIGITS_SIDE,
        patch_size=2,
        num_channels=1,
        num_labels=NUM_DIGITS,
    )
    return ViTForImageClassification(config)


ARCHITECTURES: Mapping[str, Callable[[ModelSizes], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "post_ln": _post_ln,
    "llama": _llama,
    "llama_untied": _llama_untied,
    "qwen3": _qwen3,
    "moe": _moe,
    "bert": _bert,
    "vit": _vit,
}
"""Each family's function returns an untrained model, with weights from torch's global generator.

- ``gpt2`` normalises the input of each block. ``post_ln`` is GPT-1, which normalises the output.
- ``llama`` and ``qwen3`` use one matrix for the embedding and the output. ``qwen3`` also
  normalises queries and keys.
- ``moe`` is Mixtral with 4 experts of Llama's inner width, of which a token uses 2. It is trained
  without a balancing loss.
- ``bert`` is post-LN and predicts masked tokens.
- ``vit`` classifies the 1,797 images of scikit-learn's digits in patches of 2 x 2 pixels. A run of
  2,400 steps with 8 images sees each of the 1,500 training images 13 times. Use ``vit`` to compare
  explosions, not final losses.
"""

FAMILIES: Mapping[str, str] = {
    "gpt2": "GPT-2",
    "post_ln": "GPT-1",
    "llama": "Llama",
    "llama_untied": "Llama, untied",
    "qwen3": "Qwen3",
    "moe": "Mixtral",
    "bert": "BERT",
    "vit": "ViT",
}
"""The name of each architecture for readers."""
