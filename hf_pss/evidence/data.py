"""Turn text into training blocks: train a tokenizer, load or stream documents, tokenise, pack."""

from __future__ import annotations

import glob
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pss.errors import ConfigurationError

Tokens = npt.NDArray[np.int32]
_Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

END_OF_TEXT = "<|endoftext|>"

_LOADERS = {
    **dict.fromkeys((".txt", ".md", ".py"), "text"),
    **dict.fromkeys((".json", ".jsonl"), "json"),
    ".parquet": "parquet",
}

# Documents per call: enough for the tokenizer's threads, and few enough to stop near `max_tokens`.
_DOCUMENTS_PER_BATCH = 64


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Blocks of tokens for a causal language model. The labels are the inputs.

    Args:
        blocks: (num_blocks, context_length), int64.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}


def pack_blocks(tokens: Tokens, *, context_length: int) -> BlockDataset:
    """Cut a stream of tokens into full blocks, and drop the incomplete block at the end.

    Args:
        tokens: (num_tokens,), int32. The documents are already joined with their separators.
        context_length: Tokens per block; at least 2, because the model predicts token t + 1 from t.

    Raises:
        ConfigurationError: The text does not fill one block, or `context_length` is below 2.

    >>> pack_blocks(np.arange(7, dtype=np.int32), context_length=3).blocks.tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    _check_context(context_length)
    num_blocks = len(tokens) // context_length
    if num_blocks == 0:
        raise ConfigurationError(
            f"Your text has {len(tokens)} tokens, too few for one block of {context_length}. "
            "Give more text or a shorter context."
        )
    full = tokens[: num_blocks * context_length].astype(np.int64)
    return BlockDataset(torch.from_numpy(full).view(num_blocks, context_length))


def _check_context(context_length: int) -> None:
    if context_length < 2:
        raise ConfigurationError(
            f"You asked for a context of {context_length}; a block needs at least 2 tokens."
        )


def hold_out(blocks: BlockDataset, *, fraction: float = 0.05) -> tuple[BlockDataset, BlockDataset]:
    """Split off the last blocks, which are the end of the text, for validation.

    The split is not random, because neighbouring blocks can share a document: a random split would
    leak validation text into training.

    Raises:
        ConfigurationError: The fraction is outside (0, 1), or there are fewer than two blocks.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(
            f"You asked to hold out {fraction} of the text; give a fraction between 0 and 1."
        )
    if len(blocks) < 2:
        raise ConfigurationError(
            "Your text fills one block only, so nothing is left to validate on. "
            "Give more text or a shorter context."
        )
    num_held_out = max(1, round(fraction * len(blocks)))
    num_train = max(1, len(blocks) - num_held_out)
    return BlockDataset(blocks.blocks[:num_train]), BlockDataset(blocks.blocks[num_train:])


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE like GPT-2's, which tokenises and restores any text without loss.

    Args:
        texts: The texts from which the tokenizer learns its merges; a few megabytes suffice.
        vocab_size: Size of the vocabulary. It is at least 257, for the 256 bytes and
            ``<|endoftext|>``.

    Raises:
        ConfigurationError: The vocabulary is too small to hold the bytes.
    """
    if vocab_size < 257:
        raise ConfigurationError(
            f"You asked for a vocabulary of {vocab_size}; the bytes alone need at least 257."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a trained `tokenizers.Tokenizer` so that `transformers` can save and collate with it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
) -> Tokens:
    """Tokenise documents into one stream, each followed by the end-of-text token.

    Args:
        documents: The documents. They are read lazily, and no more of them than `max_tokens` needs.
        tokenizer: A tokenizer with an end-of-text token.
        max_tokens: Length at which the stream is cut; None keeps everything.

    Returns:
        (num_tokens,), int32.

    Raises:
        ConfigurationError: The tokenizer has no end-of-text token.
    """
    pieces: list[Tokens] = []
    num_tokens = 0
    for ids in _encode_each(documents, tokenizer):
        pieces.append(np.asarray(ids, dtype=np.int32))
        num_tokens += len(ids)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return stream[:max_tokens]


def _encode_each(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Return lazily the tokens of each document, followed by the end-of-text token.

    Raises:
        ConfigurationError: The tokenizer has no end-of-text token. Raised before the first
            document is read.
    """
    separator = tokenizer.eos_token_id
    if separator is None:
        raise ConfigurationError(
            "Your tokenizer has no end-of-text token, so documents would run into each other. "
            "Set `tokenizer.eos_token`."
        )
    return (
        [*ids, separator]
        for batch in _batches(documents)
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    )


def unigram_entropy_nats(tokens: Tokens) -> float:
    """Return the entropy of the token frequencies, H = −Σ p ln p.

    This is the loss of a model without any context. A run whose loss returns to this value knows
    nothing but the token frequencies.

    >>> round(unigram_entropy_nats(np.array([0, 1, 0, 1], dtype=np.int32)), 4)
    0.6931
    """
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


@dataclass(frozen=True, slots=True)
class TextSource:
    """A file, the files that match a pattern, or a dataset on the Hub."""

    name: str
    """A file, a pattern such as ``data/*.jsonl``, or the name of a dataset on the Hub. A ``.txt``,
    ``.md`` or ``.py`` file is one document. A ``.jsonl``, ``.json`` or ``.parquet`` file holds one
    document per row."""
    column: str = "text"
    """The column that holds the text."""
    subset: str | None = None
    """Configuration of the Hub dataset, such as ``wikitext-2-raw-v1``."""
    split: str = "train"
    """A Hub dataset's split."""


def load_text(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    max_tokens: int | None = None,
) -> BlockDataset:
    """Load text from a file or from the Hub, tokenise it, and pack it into full blocks.

    Args:
        source: The text to load.
        tokenizer: A tokenizer of `transformers` with an end-of-text token.
        context_length: Tokens per block.
        max_tokens: Number of tokens at which reading stops; None reads everything.

    Raises:
        ConfigurationError: The file, dataset or column is missing, or it holds too little text.
    """
    tokens = encode_documents(read_documents(source), tokenizer, max_tokens=max_tokens)
    if len(tokens) == 0:
        raise ConfigurationError(f"{source.name} holds no text. Give one that does.")
    return pack_blocks(tokens, context_length=context_length)


def read_documents(source: TextSource) -> Iterator[str]:
    """Return a lazy iterator over the documents of a file or a Hub dataset. It skips blanks.

    This function opens the source at once, and its errors are those of `open_rows`.
    """
    return _texts_of(open_rows(source), source.column)


def open_rows(
    source: TextSource, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Open the rows of a source, and check their column.

    Args:
        source: What to open.
        streaming: Read the rows lazily, and copy nothing to the disk.

    Raises:
        ConfigurationError: The file, dataset or column is missing.
    """
    rows = _load_rows(source, streaming=streaming)
    # The columns of a stream of JSON lines are unknown before its first row.
    names = rows.column_names or list(next(iter(rows), {}))
    if names and source.column not in names:
        raise ConfigurationError(
            f"{source.name} has no column {source.column!r}; it has {', '.join(map(repr, names))}. "
            "Name the one that holds the text."
        )
    return rows


def _load_rows(source: TextSource, *, streaming: bool) -> _Rows:
    name, subset, split = source.name, source.subset, source.split
    path = Path(name).expanduser()
    if path.is_file():
        return _load_files([path], streaming=streaming)
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ConfigurationError(f"No file matches {name}. Check the pattern.")
        return _load_files([Path(one) for one in found], streaming=streaming)
    if path.is_dir():
        raise ConfigurationError(
            f"{name} is a folder; give one text, JSONL or parquet file, or a pattern: "
            f"{name.rstrip('/')}/*.jsonl."
        )
    if path.suffix in _LOADERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigurationError(f"There is no file {name}. Check the path.")
    try:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    # RuntimeError means that the dataset is a script, which datasets 4 and later do not run.
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"There is no file {name!r}, and the Hub gave no dataset of that name "
            f"(subset {subset!r}, split {split!r}): {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ConfigurationError(
            f"The Hub's dataset {name!r} could not be read: {error.__cause__ or error}"
        ) from error


def _load_files(paths: Sequence[Path], *, streaming: bool) -> _Rows:
    for path in paths:
        if path.suffix not in _LOADERS:
            raise ConfigurationError(
                f"The format of {path.name} is unknown from its ending; "
                f"use one of {', '.join(_LOADERS)}."
            )
        if path.stat().st_size == 0:
            raise ConfigurationError(f"{path} is empty. Give a file with text.")
    loader, *others = dict.fromkeys(_LOADERS[path.suffix] for path in paths)
    if others:
        raise ConfigurationError(
            f"{paths[0]} and its neighbours are of several formats ({loader}, "
            f"{', '.join(others)}). Give a pattern for files of one."
        )
    names = [str(path) for path in paths]
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    options |= {"data_files": names, "split": "train", "streaming": streaming}
    try:
        return datasets.load_dataset(loader, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ConfigurationError(
            f"{', '.join(names[:3])} could not be read as {loader}: {error.__cause__ or error}"
        ) from error


def _texts_of(rows: _Rows, column: str) -> Iterator[str]:
    """Yield the texts of a column lazily, and skip blank texts.

    Raises:
        ConfigurationError: The column holds something other than text.
    """
    texts: Iterable[Any]
    if isinstance(rows, datasets.IterableDataset):
        # This reads row by row, because `iter(batch_size=...)` gives every DataLoader worker
        # all rows (datasets 5.2). It does not use select_columns, because the result of that
        # forgets the epoch.
        texts = (row[column] for row in rows)
    else:
        batches = rows.select_columns(column).iter(batch_size=_DOCUMENTS_PER_BATCH)
        texts = (text for batch in batches for text in batch[column])
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ConfigurationError(
                f"Column {column!r} holds {type(text).__name__}, not text. "
                "Name the one that holds the text."
            )
        if text and text.strip():
            yield text


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _DOCUMENTS_PER_BATCH)):
        yield batch


# ---- text as a stream: one batch of documents in memory ----


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
    _check_context(context_length)
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
        _encode_each([], tokenizer)  # refuses a bad tokenizer here and not later in a worker
        self._rows = rows.select_columns(column)
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._column = column

    def set_epoch(self, epoch: int) -> None:
        """Change the order of shuffled rows. The Trainer calls this at the start of every pass."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # In a worker of a DataLoader, the rows yield only the files of that worker.
        documents = _encode_each(_texts_of(self._rows, self._column), self._tokenizer)
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
