"""Packing a stream of documents into full blocks, none in memory longer than its block."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import BlockDataset, encode_each, texts_of

__all__ = ["PackedStream", "first_blocks", "is_held_out", "pack_documents", "split_stream"]


def pack_documents(
    documents: Iterable[Sequence[int]], *, context_length: int
) -> Iterator[list[int]]:
    """Cut documents, joined end to end, into full blocks; what is left over starts the next block.

    Only the very end, shorter than a block, is dropped: there is no padding.

    Args:
        documents: Token ids, each document with its separator; read as blocks are asked for.
        context_length: Tokens a block, at least 2: the model predicts token t + 1 from t.

    Raises:
        ConfigurationError: Nothing to predict in a block.

    >>> list(pack_documents([[1, 2, 0], [3, 0], [4, 5, 6, 0]], context_length=4))
    [[1, 2, 0, 3], [0, 4, 5, 6]]
    """
    if context_length < 2:
        raise ConfigurationError(
            f"You asked for a context of {context_length}; a block needs at least 2 tokens."
        )
    carried: list[int] = []
    for document in documents:
        carried.extend(document)
        full = len(carried) - len(carried) % context_length
        for start in range(0, full, context_length):
            yield carried[start : start + context_length]
        del carried[:full]


class PackedStream(IterableDataset[dict[str, torch.Tensor]]):
    """Rows of text, tokenised and packed while they are read: every label is the input itself.

    It holds one batch of documents. It has no length, so a run needs ``max_steps``; a resumed run
    reads again what it has seen, because the Trainer skips it. Several workers of a DataLoader
    share the rows' files, so more workers than files idle. Under several ranks Accelerate reads
    on the first and hands each rank its own part of the batch.

    Args:
        rows: From ``load_dataset(..., streaming=True)``, or ``to_iterable_dataset()`` of others.
        tokenizer: Must name an end-of-text token; it follows every document.
        context_length: Tokens a block.
        column: Where rows keep their text.

    Raises:
        ConfigurationError: The tokenizer has no end-of-text token, or, when read, a column without
            text.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        column: str = "text",
    ) -> None:
        encode_each([], tokenizer)  # refuses the tokenizer now, not in a worker
        self._rows = rows.select_columns(column)
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._column = column

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, where the rows are shuffled; the Trainer calls this at every pass."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # In a DataLoader's worker the rows themselves give that worker's files only.
        documents = encode_each(texts_of(self._rows, self._column), self._tokenizer)
        for block in pack_documents(documents, context_length=self._context_length):
            ids = torch.tensor(block)
            yield {"input_ids": ids, "labels": ids}


def is_held_out(text: str, *, fraction: float) -> bool:
    """Tell by a hash of the text whether a document is for validation.

    Neither the order of reading nor the number of workers moves a document, and equal documents
    are on one side.

    >>> [is_held_out("a document", fraction=fraction) for fraction in (0.0, 1.0)]
    [False, True]
    """
    # surrogatepass: what JSON can hold, UTF-8 need not.
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) < fraction * 2**32


def split_stream(
    rows: datasets.IterableDataset, *, column: str = "text", fraction: float
) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Split rows into those to train on and those held out, by `is_held_out`; nothing is read.

    Rows whose column holds no text count as those to train on, where reading refuses or skips them.
    """
    keep = partial(_is_on_side, fraction=fraction, held_out=False)
    hold = partial(_is_on_side, fraction=fraction, held_out=True)
    return (
        rows.filter(keep, input_columns=[column]),
        rows.filter(hold, input_columns=[column]),
    )


def first_blocks(stream: PackedStream, num_blocks: int) -> BlockDataset:
    """Read the first blocks of a stream into memory: what every evaluation measures on.

    Raises:
        ConfigurationError: The stream holds not one full block.
    """
    blocks = [item["input_ids"] for item in islice(stream, num_blocks)]
    if not blocks:
        raise ConfigurationError(
            "The held-out documents fill no block. Hold out a larger validation_fraction, or give "
            "more text or a shorter context."
        )
    return BlockDataset(torch.from_numpy(np.stack([block.numpy() for block in blocks])))


def _is_on_side(text: object, *, fraction: float, held_out: bool) -> bool:
    return (isinstance(text, str) and is_held_out(text, fraction=fraction)) == held_out
