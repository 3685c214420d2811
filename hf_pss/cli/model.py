"""The model that `hf-pss train` trains: existing weights, or fresh ones from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pss.cli.parsing import one_line, suggest
from hf_pss.errors import ConfigurationError

__all__ = [
    "SIZES",
    "check_fit",
    "load_model",
    "load_tokenizer",
    "make_config",
    "make_model",
    "read_overrides",
]

# Layers, width and heads of GPT-2 (Radford et al. 2019, table 2). As in the released weights, the
# width of a head is 64.
SIZES = {
    "124m": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "350m": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "774m": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "1.5b": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ConfigurationError: The folder and the Hub do not have such a tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_not_found("tokenizer", source, error)) from error


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub.

    Args:
        source: The folder, or the name on the Hub.
        options: Options of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.

    Raises:
        ConfigurationError: The model was not found, or it is not a causal language model.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_not_found("model", source, error)) from error


def make_config(source: str, overrides: str | None) -> PretrainedConfig:
    """Return the configuration of a model type or file, with changes.

    Args:
        source: A JSON or YAML file, or a model type such as ``gpt2``.
        overrides: ``n_layer=8,n_embd=64``, or a JSON mapping.

    Raises:
        ConfigurationError: The configuration, or an option to override, does not exist.
    """
    values = _read_config(source)
    if values["model_type"] not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"{source!r} is neither a JSON or YAML file nor a model type of transformers, such as "
            f"gpt2, llama or qwen3.{suggest(source, CONFIG_MAPPING)}"
        )
    config = _configure(values)
    changes = read_overrides(overrides or "")
    known = {*config.to_dict(), *config.attribute_map}
    for name in changes:
        if name not in known:
            raise ConfigurationError(
                f"{config.model_type} has no {name!r} to override.{suggest(name, known)}"
            )
    # The config is built a second time, because it derives sizes from the values that change.
    return _configure(values | changes)


def make_model(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_multiple: int = 1,
    **options: Any,
) -> PreTrainedModel:
    """Return a model for the tokenizer's vocabulary, with weights from torch's global generator.

    Args:
        config: The configuration. This function sets its vocabulary in place.
        tokenizer: Gives the vocabulary and the special tokens.
        vocab_multiple: Round the number of embeddings up to a multiple of this; 64 suits GPUs.
        options: Options of ``AutoModelForCausalLM.from_config``, such as ``attn_implementation``.

    Raises:
        ConfigurationError: No causal language model has such a configuration.
    """
    config.vocab_size = -(-len(tokenizer) // vocab_multiple) * vocab_multiple
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(
            f"No causal language model can be built from this {config.model_type} config: "
            f"{one_line(error)[:200]}"
        ) from error


def check_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context_length: int
) -> None:
    """Check that the model can read every token and a full block of tokens.

    Raises:
        ConfigurationError: The vocabulary or the context is too large for the model.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigurationError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}. "
            "Use the model's own tokenizer."
        )
    longest = getattr(model.config, "max_position_embeddings", None)  # absent: no limit
    if longest is not None and context_length > longest:
        raise ConfigurationError(
            f"You asked for a context of {context_length}, but the model reads at most {longest} "
            "tokens. Give a shorter --context_length."
        )


def read_overrides(text: str) -> dict[str, Any]:
    """Read ``n_layer=8,n_embd=64``, or a JSON mapping.

    Raises:
        ConfigurationError: The text is neither.
    """
    if isinstance(values := _parse_value(text), dict):
        return values
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigurationError(
                f"--model_overrides takes name=value with commas between; you gave {name!r}."
            )
    return {name.strip(): _parse_value(value.strip()) for name, _, value in pairs}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _not_found(what: str, source: str, error: Exception) -> str:
    if Path(source).expanduser().is_dir():
        return f"The folder {source} holds no {what} to load: {one_line(error)}"
    return (
        f"There is no folder {source!r}, and the Hub gave no {what} of that name: "
        f"{one_line(error)} Check the spelling, and your connection or cache."
    )


def _read_config(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.suffix not in (".json", ".yaml", ".yml"):
        return {"model_type": source}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # every JSON file is valid YAML
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is neither JSON nor YAML: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigurationError(
            f"{path} names no model_type. Add a line such as `model_type: gpt2`."
        )
    return values


def _configure(values: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigurationError(
            f"A {values['model_type']} config cannot hold these values: {error}"
        ) from error
