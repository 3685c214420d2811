"""Turn text into training blocks: train a tokenizer, load documents, tokenise, pack."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pss.errors import ConfigurationError

__all__ = [
    "END_OF_TEXT",
    "BlockDataset",
    "Tokens",
    "encode_documents",
    "encode_each",
    "hold_out",
    "load_text",
    "open_rows",
    "pack_blocks",
    "read_documents",
    "texts_of",
    "train_tokenizer",
    "unigram_entropy_nats",
    "wrap_tokenizer",
]

Tokens = npt.NDArray[np.int32]
_Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

END_OF_TEXT = "<|endoftext|>"

_LOADERS = {".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json"}
_LOADERS |= {".parquet": "parquet"}

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
    if context_length < 2:
        raise ConfigurationError(
            f"You asked for a context of {context_length}; a block needs at least 2 tokens."
        )
    num_blocks = len(tokens) // context_length
    if num_blocks == 0:
        raise ConfigurationError(
            f"Your text has {len(tokens)} tokens, too few for one block of {context_length}. "
            "Give more text or a shorter context."
        )
    full = tokens[: num_blocks * context_length].astype(np.int64)
    return BlockDataset(torch.from_numpy(full).view(num_blocks, context_length))


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
    for ids in encode_each(documents, tokenizer):
        pieces.append(np.asarray(ids, dtype=np.int32))
        num_tokens += len(ids)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return stream[:max_tokens]


def encode_each(
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
        for batch in _batches(documents, _DOCUMENTS_PER_BATCH)
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


def load_text(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    max_tokens: int | None = None,
    cache_dir: Path | None = None,
) -> BlockDataset:
    """Load text from a file or from the Hub, tokenise it, and pack it into full blocks.

    Args:
        source: A file, a pattern such as ``data/*.jsonl``, or the name of a dataset on the Hub. A
            ``.txt``, ``.md`` or ``.py`` file is one document. A ``.jsonl``, ``.json`` or
            ``.parquet`` file holds one document per row.
        tokenizer: A tokenizer of `transformers` with an end-of-text token.
        context_length: Tokens per block.
        column: The column that holds the text.
        subset: Configuration of the Hub dataset, such as ``wikitext-2-raw-v1``.
        split: A Hub dataset's split.
        max_tokens: Number of tokens at which reading stops; None reads everything.
        cache_dir: The folder in which `datasets` keeps a copy. None means its default folder.

    Raises:
        ConfigurationError: The file, dataset or column is missing, or it holds too little text.
    """
    documents = read_documents(
        source, column=column, subset=subset, split=split, cache_dir=cache_dir
    )
    tokens = encode_documents(documents, tokenizer, max_tokens=max_tokens)
    if len(tokens) == 0:
        raise ConfigurationError(f"{source} holds no text. Give one that does.")
    return pack_blocks(tokens, context_length=context_length)


def read_documents(
    source: str | Path,
    *,
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    cache_dir: Path | None = None,
) -> Iterator[str]:
    """Return a lazy iterator over the documents of a file or a Hub dataset, without blank ones.

    The arguments and errors are those of `load_text`. This function opens the source at once.
    """
    rows = open_rows(source, column=column, subset=subset, split=split, cache_dir=cache_dir)
    return texts_of(rows, column)


def open_rows(
    source: str | Path,
    *,
    column: str | None = "text",
    subset: str | None = None,
    split: str = "train",
    cache_dir: Path | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a file, the files that match a pattern, or a dataset on the Hub, and check its column.

    Args:
        source: See `load_text`.
        column: The column that holds the text; None accepts any columns.
        subset: A Hub dataset's configuration.
        split: A Hub dataset's split.
        cache_dir: The folder in which `datasets` keeps a copy. None means its default folder.
        streaming: Read the rows lazily, and copy nothing to the disk.

    Raises:
        ConfigurationError: The file, dataset or column is missing.
    """
    options = {"cache_dir": cache_dir, "streaming": streaming}
    rows = _load_rows(str(source), subset=subset, split=split, **options)
    # The columns of a stream of JSON lines are unknown before its first row.
    names = rows.column_names or list(next(iter(rows), {}))
    if column is not None and names and column not in names:
        raise ConfigurationError(
            f"{source} has no column {column!r}; it has {', '.join(map(repr, names))}. "
            "Name the one that holds the text."
        )
    return rows


def _load_rows(source: str, *, subset: str | None, split: str, **options: Any) -> _Rows:
    path = Path(source).expanduser()
    if path.is_file():
        return _load_files([path], **options)
    if glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ConfigurationError(f"No file matches {source}. Check the pattern.")
        return _load_files([Path(name) for name in found], **options)
    if path.is_dir():
        raise ConfigurationError(
            f"{source} is a folder; give one text, JSONL or parquet file, or a pattern: "
            f"{source.rstrip('/')}/*.jsonl."
        )
    if path.suffix in _LOADERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigurationError(f"There is no file {source}. Check the path.")
    try:
        return datasets.load_dataset(source, subset, split=split, **options)
    # RuntimeError means that the dataset is a script, which datasets 4 and later do not run.
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"There is no file {source!r}, and the Hub gave no dataset of that name "
            f"(subset {subset!r}, split {split!r}): {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ConfigurationError(
            f"The Hub's dataset {source!r} could not be read: {error.__cause__ or error}"
        ) from error


def _load_files(paths: Sequence[Path], **options: Any) -> _Rows:
    loaders = {path: _LOADERS.get(path.suffix) for path in paths}
    for path, loader in loaders.items():
        if loader is None:
            raise ConfigurationError(
                f"The format of {path.name} is unknown from its ending; "
                f"use one of {', '.join(_LOADERS)}."
            )
        if path.stat().st_size == 0:
            raise ConfigurationError(f"{path} is empty. Give a file with text.")
    loader, *others = dict.fromkeys(loaders.values())
    if others:
        raise ConfigurationError(
            f"{paths[0]} and its neighbours are of several formats ({loader}, "
            f"{', '.join(map(str, others))}). Give a pattern for files of one."
        )
    how = {"sample_by": "document"} if loader == "text" else {}
    names = [str(path) for path in paths]
    try:
        return datasets.load_dataset(loader, data_files=names, split="train", **options, **how)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ConfigurationError(
            f"{', '.join(names[:3])} could not be read as {loader}: {error.__cause__ or error}"
        ) from error


def texts_of(rows: _Rows, column: str) -> Iterator[str]:
    """Yield the texts of a column lazily, without the blank ones.

    Raises:
        ConfigurationError: The column holds something other than text.
    """
    for text in _column_of(rows, column):
        if text is None:
            continue
        if not isinstance(text, str):
            raise ConfigurationError(
                f"Column {column!r} holds {type(text).__name__}, not text. "
                "Name the one that holds the text."
            )
        if text.strip():
            yield text


def _column_of(rows: _Rows, column: str) -> Iterator[Any]:
    if isinstance(rows, datasets.IterableDataset):
        # This reads row by row, because `iter(batch_size=...)` gives every DataLoader worker
        # all rows (datasets 5.2). It does not use select_columns, because the result of that
        # forgets the epoch.
        for row in rows:
            yield row[column]
        return
    for batch in rows.select_columns(column).iter(batch_size=_DOCUMENTS_PER_BATCH):
        yield from batch[column]


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
