"""The text that `hf-pss train` learns from: blocks to train and to validate on, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_pss.cli.parsing import DataOptions
from hf_pss.evidence.corpus import build_corpus, read_library
from hf_pss.evidence.data import (
    BlockDataset,
    encode_documents,
    hold_out,
    load_text,
    pack_blocks,
    read_documents,
    train_tokenizer,
)

__all__ = ["BUILT_IN", "Text", "load_training_text"]

BUILT_IN = "python"

# A vocabulary is learned from the beginning of a text: a few megabytes suffice.
_TOKENIZER_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenised text, split, and what tokenised it."""

    train: BlockDataset
    validation: BlockDataset
    tokenizer: PreTrainedTokenizerBase


def load_training_text(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int
) -> Text:
    """Load, tokenise and split the text.

    Args:
        options: Which text, and how much of it.
        tokenizer: None trains a byte-level BPE of `vocab_size` tokens on the text.
        vocab_size: Used where a tokenizer is trained.

    Raises:
        ConfigurationError: No such text or column, or too little text for the context.
    """
    load = _load_built_in if options.dataset == BUILT_IN else _load_own
    text = load(options, tokenizer, vocab_size)
    validation = BlockDataset(text.validation.blocks[: options.max_validation_blocks])
    return Text(text.train, validation, text.tokenizer)


def _load_built_in(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Text:
    length = options.context_length
    if tokenizer is None:
        corpus = build_corpus(
            vocab_size=vocab_size, context_length=length, max_tokens=options.max_tokens
        )
        return Text(corpus.train, corpus.validation, corpus.tokenizer)
    train, held_out = read_library()
    tokens = encode_documents(train, tokenizer, max_tokens=options.max_tokens)
    return Text(
        pack_blocks(tokens, context_length=length),
        pack_blocks(encode_documents(held_out, tokenizer), context_length=length),
        tokenizer,
    )


def _load_own(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Text:
    source: dict[str, Any] = {
        "column": options.text_column,
        "subset": options.dataset_subset,
        "split": options.dataset_split,
    }
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
    return Text(*hold_out(blocks, fraction=options.validation_fraction), tokenizer)


def _first_bytes(documents: Iterable[str]) -> Iterator[str]:
    left = _TOKENIZER_BYTES
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return
