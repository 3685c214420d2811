"""What `hf-pss train` trains, and on what: the model, its tokenizer, and the text in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_pss.cli.parsing import one_line, read_yaml
from hf_pss.cli.train_options import DataOptions, ModelOptions, TrainPlan
from hf_pss.errors import ConfigurationError, did_you_mean
from hf_pss.evidence import data
from hf_pss.evidence.corpus import build_corpus, read_library

BUILT_IN = "python"

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
        ConfigurationError: Neither a folder nor the Hub has this tokenizer.
    """
    with _finding("tokenizer", source):
        return AutoTokenizer.from_pretrained(source)


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub.

    Args:
        source: The folder, or the name on the Hub.
        options: Options of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.

    Raises:
        ConfigurationError: The model was not found, or it is not a causal language model.
    """
    with _finding("model", source):
        return AutoModelForCausalLM.from_pretrained(source, **options)


@contextmanager
def _finding(what: str, source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(source).expanduser().is_dir():
            message = f"The folder {source} holds no {what} to load: {one_line(error)}"
        else:
            message = (
                f"There is no folder {source!r}, and the Hub gave no {what} of that name: "
                f"{one_line(error)} Check the spelling, and your connection or cache."
            )
        raise ConfigurationError(message) from error


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
            f"gpt2, llama or qwen3.{did_you_mean(source, CONFIG_MAPPING)}"
        )
    config = _configure(values)
    changes = read_overrides(overrides or "")
    known = {*config.to_dict(), *config.attribute_map}
    for name in changes:
        if name not in known:
            raise ConfigurationError(
                f"{config.model_type} has no {name!r} to override.{did_you_mean(name, known)}"
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


def _read_config(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.suffix not in (".json", ".yaml", ".yml"):
        return {"model_type": source}
    values = read_yaml(path)  # every JSON file is valid YAML
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


# nanoGPT's choice for GPT-2: 50,257 tokens become 50,304 rows, because GPUs multiply multiples of
# 64 faster.
_VOCAB_MULTIPLE = 64

# A few megabytes from the beginning of a text suffice to learn a vocabulary.
_TOKENIZER_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenised text in full blocks, split into training and validation, with the tokenizer."""

    train: data.BlockDataset | data.PackedStream
    validation: data.BlockDataset
    tokenizer: PreTrainedTokenizerBase


def load_training_text(plan: TrainPlan, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    """Load, tokenise and split the text, or open it as a stream.

    Args:
        plan: The options that say which text to load, and how much of it.
        tokenizer: The tokenizer. With None a byte-level BPE of ``vocab_size`` tokens is
            trained on the text.

    Raises:
        ConfigurationError: The text or the column does not exist, or the text does
            not fill a block.
    """
    if plan.scale.streaming and tokenizer is not None:
        return _open_stream(plan, tokenizer)
    options, vocab_size = plan.data, plan.model.vocab_size
    length, max_tokens = options.context_length, options.max_tokens
    if options.dataset != BUILT_IN:
        source = _source(options)
        if tokenizer is None:
            beginning = _first_bytes(data.read_documents(source))
            tokenizer = data.train_tokenizer(beginning, vocab_size=vocab_size)
        blocks = data.load_text(source, tokenizer, context_length=length, max_tokens=max_tokens)
        train, validation = data.hold_out(blocks, fraction=options.validation_fraction)
    elif tokenizer is None:
        corpus = build_corpus(vocab_size=vocab_size, context_length=length, max_tokens=max_tokens)
        train, validation, tokenizer = corpus.train, corpus.validation, corpus.tokenizer
    else:
        train, validation = (
            data.pack_blocks(
                data.encode_documents(texts, tokenizer, max_tokens=most), context_length=length
            )
            for texts, most in zip(read_library(), (max_tokens, None), strict=True)
        )
    validation = data.BlockDataset(validation.blocks[: options.max_validation_blocks])
    return Text(train, validation, tokenizer)


def _open_stream(plan: TrainPlan, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Open rows that training reads later, and read only the validation blocks now."""
    options = plan.data
    if plan.arguments.max_steps <= 0:
        raise ConfigurationError("A stream has no length: set with --max_steps when to stop.")
    if options.dataset == BUILT_IN:
        raise ConfigurationError(
            f"--streaming reads files or a dataset of the Hub; leave it out with {BUILT_IN!r}."
        )
    if options.max_tokens is not None:
        raise ConfigurationError("--max_tokens has no effect on a stream; use --max_steps.")
    column = options.text_column
    rows = data.open_rows(_source(options), streaming=True)
    kept, held_out = data.split_stream(rows, column=column, fraction=options.validation_fraction)
    shuffled = kept.shuffle(seed=plan.arguments.seed, buffer_size=plan.scale.shuffle_buffer)
    train, validation = (
        data.PackedStream(part, tokenizer, context_length=options.context_length, column=column)
        for part in (shuffled, held_out)
    )
    return Text(train, data.first_blocks(validation, options.max_validation_blocks), tokenizer)


def _source(options: DataOptions) -> data.TextSource:
    return data.TextSource(
        name=options.dataset,
        column=options.text_column,
        subset=options.dataset_subset,
        split=options.dataset_split,
    )


def _first_bytes(documents: Iterable[str]) -> Iterator[str]:
    left = _TOKENIZER_BYTES
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


# ---- Load the model and the text together ----


def named_model(plan: TrainPlan) -> ModelOptions:
    """Return the options of the one model that is given, with ``--model_size`` spelled out."""
    model, size = plan.model, plan.scale.model_size
    options = {
        "--model": model.model,
        "--model_config": model.model_config,
        "--model_size": size,
    }
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        raise ConfigurationError(
            f"You gave {' and '.join(given) or 'no model'}. Give --model gpt2 (or a folder) to "
            "fine-tune weights that exist, or one of --model_config gpt2 and --model_size 124m to "
            "train fresh ones."
        )
    if model.model_overrides and model.model:
        raise ConfigurationError("--model_overrides shapes fresh weights: it needs --model_config.")
    if size is None:
        return model
    shape: dict[str, Any] = {**SIZES[size], "n_positions": plan.data.context_length}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= read_overrides(model.model_overrides or "")
    return replace(model, model_config="gpt2", model_overrides=json.dumps(shape))


def load(plan: TrainPlan, checkpoint: Path | None) -> tuple[PreTrainedModel, Text]:
    """Load the model and the text. Whichever can fail sooner is loaded first."""
    options = plan.model
    given = plan.scale.attn_implementation
    attention = {"attn_implementation": given} if given else {}
    source = options.model
    # A checkpoint in shards is not used here, because the Trainer loads its shards into the model.
    if checkpoint and any(checkpoint.glob("model*.safetensors")):
        source = str(checkpoint)  # which has the right vocabulary
    model = load_model(source, dtype=options.dtype, **attention) if source else None
    # A resumed run must cut its text into the same tokens.
    tokenizer = load_tokenizer(str(checkpoint)) if checkpoint else _find_tokenizer(plan)
    if model is not None:
        return model, load_training_text(plan, tokenizer)
    config = make_config(str(options.model_config), options.model_overrides)
    text = load_training_text(plan, tokenizer)
    multiple = _VOCAB_MULTIPLE if plan.scale.model_size else 1
    set_seed(plan.arguments.seed)
    return make_model(config, text.tokenizer, vocab_multiple=multiple, **attention), text


def _find_tokenizer(plan: TrainPlan) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer. None means that one will be trained on the text."""
    if source := plan.model.tokenizer or plan.model.model:
        return load_tokenizer(source)
    if plan.scale.streaming or (plan.scale.model_size and plan.data.dataset != BUILT_IN):
        return load_tokenizer("gpt2")
    return None
