"""Pack a stream of documents into full blocks, and hold one batch of documents in memory."""

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
    """Join documents end to end and cut them into full blocks, lazily.

    This function pads no block. It drops only the incomplete block at the very end.

    Args:
        documents: Token ids of each document, with the separator at the end.
        context_length: Tokens per block; at least 2, because the model predicts token t + 1 from t.

    Raises:
        ConfigurationError: `context_length` is below 2.

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
    """A stream of rows that is tokenised and packed while it is read. The labels are the inputs.

    The stream has no length, so a run needs ``max_steps``. A resumed run reads the blocks it has
    already seen, because the Trainer skips them one by one. The workers of a DataLoader divide the
    files of the rows among themselves, so workers beyond the number of files stay idle. If there
    are several ranks, Accelerate reads on the first rank and sends each rank its part of the batch.

    Args:
        rows: The result of ``load_dataset(..., streaming=True)``, or of a dataset's
            ``to_iterable_dataset()``.
        tokenizer: A tokenizer with an end-of-text token, which follows every document.
        context_length: Tokens per block.
        column: The column that holds the text.

    Raises:
        ConfigurationError: The tokenizer has no end-of-text token, or, while reading, the column
            holds something other than text.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        column: str = "text",
    ) -> None:
        encode_each([], tokenizer)  # refuses a bad tokenizer here and not later in a worker
        self._rows = rows.select_columns(column)
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._column = column

    def set_epoch(self, epoch: int) -> None:
        """Change the order of shuffled rows. The Trainer calls this at the start of every pass."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # In a worker of a DataLoader, the rows yield only the files of that worker.
        documents = encode_each(texts_of(self._rows, self._column), self._tokenizer)
        for block in pack_documents(documents, context_length=self._context_length):
            ids = torch.tensor(block)
            yield {"input_ids": ids, "labels": ids}


def is_held_out(text: str, *, fraction: float) -> bool:
    """Return whether a document is for validation, which a hash of its text decides.

    The order of reading and the number of workers do not matter. Equal documents get
    the same answer.

    >>> [is_held_out("a document", fraction=fraction) for fraction in (0.0, 1.0)]
    [False, True]
    """
    # JSON can hold lone surrogates, which plain UTF-8 refuses.
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) < fraction * 2**32


def split_stream(
    rows: datasets.IterableDataset, *, column: str = "text", fraction: float
) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Split rows by `is_held_out` into training and validation rows, without reading any.

    Rows without text in the column count as training rows. Reading them later skips them or
    raises an error.
    """
    train, held_out = (
        rows.filter(partial(_is_on_side, fraction=fraction, held_out=side), input_columns=[column])
        for side in (False, True)
    )
    return train, held_out


def first_blocks(stream: PackedStream, num_blocks: int) -> BlockDataset:
    """Read the first blocks of a stream into memory, for evaluation.

    Raises:
        ConfigurationError: The stream does not fill one block.
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
