"""The text for `hf-pss train`: blocks for training, blocks for validation, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_pss.cli.train_options import DataOptions
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.corpus import build_corpus, read_library
from hf_pss.evidence.data import (
    BlockDataset,
    encode_documents,
    hold_out,
    load_text,
    open_rows,
    pack_blocks,
    read_documents,
    train_tokenizer,
)
from hf_pss.evidence.packing import PackedStream, first_blocks, split_stream

__all__ = ["BUILT_IN", "Text", "load_training_text", "open_stream"]

BUILT_IN = "python"

# A few megabytes from the beginning of a text suffice to learn a vocabulary.
_TOKENIZER_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenised text in full blocks, split into training and validation, with the tokenizer."""

    train: BlockDataset | PackedStream
    validation: BlockDataset
    tokenizer: PreTrainedTokenizerBase


def load_training_text(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int
) -> Text:
    """Load, tokenise and split the text.

    Args:
        options: The options that say which text to load, and how much of it.
        tokenizer: The tokenizer. With None a byte-level BPE of `vocab_size` tokens is
            trained on the text.
        vocab_size: Vocabulary of a tokenizer that is trained here.

    Raises:
        ConfigurationError: The text or the column does not exist, or the text does
            not fill a block.
    """
    load = _load_built_in if options.dataset == BUILT_IN else _load_own
    train, validation, tokenizer = load(options, tokenizer, vocab_size)
    return Text(train, BlockDataset(validation.blocks[: options.max_validation_blocks]), tokenizer)


def open_stream(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, shuffle_buffer: int, seed: int
) -> Text:
    """Open rows that training reads later, and read only the validation blocks now.

    Args:
        options: The options that say which rows to open, and what share of them to hold out.
        tokenizer: A tokenizer with an end-of-text token.
        shuffle_buffer: Number of documents within which rows are shuffled.
        seed: Seed of the shuffle.

    Raises:
        ConfigurationError: The rows or the column do not exist, or an option has no
            effect on a stream.
    """
    if options.dataset == BUILT_IN:
        raise ConfigurationError(
            f"--streaming reads files or a dataset of the Hub; leave it out with {BUILT_IN!r}."
        )
    if options.max_tokens is not None:
        raise ConfigurationError("--max_tokens has no effect on a stream; use --max_steps.")
    column = options.text_column
    rows = open_rows(options.dataset, **_source(options), streaming=True)
    kept, held_out = split_stream(rows, column=column, fraction=options.validation_fraction)
    train, validation = (
        PackedStream(part, tokenizer, context_length=options.context_length, column=column)
        for part in (kept.shuffle(seed=seed, buffer_size=shuffle_buffer), held_out)
    )
    return Text(train, first_blocks(validation, options.max_validation_blocks), tokenizer)


_Loaded = tuple[BlockDataset, BlockDataset, PreTrainedTokenizerBase]


def _load_built_in(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> _Loaded:
    length = options.context_length
    if tokenizer is None:
        corpus = build_corpus(
            vocab_size=vocab_size, context_length=length, max_tokens=options.max_tokens
        )
        return corpus.train, corpus.validation, corpus.tokenizer
    train, held_out = read_library()
    tokens = encode_documents(train, tokenizer, max_tokens=options.max_tokens)
    return (
        pack_blocks(tokens, context_length=length),
        pack_blocks(encode_documents(held_out, tokenizer), context_length=length),
        tokenizer,
    )


def _load_own(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> _Loaded:
    source = _source(options)
    if tokenizer is None:
        beginning = _first_bytes(read_documents(options.dataset, **source))
        tokenizer = train_tokenizer(beginning, vocab_size=vocab_size)
    blocks = load_text(
        options.dataset,
        tokenizer,
        context_length=options.context_length,
        max_tokens=options.max_tokens,
        **source,
    )
    return *hold_out(blocks, fraction=options.validation_fraction), tokenizer


def _source(options: DataOptions) -> dict[str, Any]:
    return {
        "column": options.text_column,
        "subset": options.dataset_subset,
        "split": options.dataset_split,
    }


def _first_bytes(documents: Iterable[str]) -> Iterator[str]:
    left = _TOKENIZER_BYTES
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return
