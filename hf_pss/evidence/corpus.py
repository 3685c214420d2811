"""Build the built-in corpus from the Python sources that the running interpreter ships."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import (
    BlockDataset,
    encode_documents,
    pack_blocks,
    train_tokenizer,
    unigram_entropy_nats,
    wrap_tokenizer,
)

Progress = Callable[[str], None]

# These are not part of the language's library. The tests exist in only some installations.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# A third of the library. Learning 2,048 tokens from it takes about a second.
_TOKENIZER_BYTES = 4_000_000
_VALIDATION_FRACTION = 0.05
_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One file, its path relative to the library's root."""

    path: str
    text: str

    @property
    def rank(self) -> float:
        """A number in [0, 1) that depends on the path alone; it orders and splits the files."""
        return int(hashlib.sha256(self.path.encode()).hexdigest()[:8], 16) / 16**8


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and validation blocks of the built-in corpus, and their tokenizer."""

    train: BlockDataset
    """Blocks of {"input_ids", "labels"}, each (context_length,), int64."""
    validation: BlockDataset
    """Blocks of the same form, from the held-out files."""
    tokenizer: PreTrainedTokenizerFast
    """Byte-level BPE; ``<|endoftext|>`` separates files and pads."""
    fingerprint: str
    """Hash of the sources, the options and the tokenizer's version. Equal hashes mean
    equal blocks."""
    description: str
    """One line for people: Python version, files, bytes, tokens."""
    unigram_entropy_nats: float
    """Loss of a model that predicts the token frequencies of the training text."""


def build_corpus(
    *,
    vocab_size: int = 2048,
    context_length: int,
    max_tokens: int | None = 4_000_000,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenise the interpreter's library, or read the tokens from the cache of an earlier call.

    A hash of their path selects about 5 % of the files for validation.

    Args:
        vocab_size: Number of tokens of the byte-level BPE that is trained on the corpus.
        context_length: Tokens per block.
        max_tokens: Largest number of training tokens. With None the corpus is the whole library.
        cache_dir: Folder of the cache. None means ``HF_PSS_CACHE``, or ``~/.cache/hf_pss``.
        progress: Receives a short description of each step of the work, if the cache
            lacks the tokens.

    Raises:
        ConfigurationError: The interpreter ships no sources, or an option leaves no block.
    """
    sources = _read_sources()
    options: dict[str, Any] = {"vocab_size": vocab_size, "max_tokens": max_tokens}
    fingerprint = _fingerprint(sources, options)
    cache = cache_dir or os.environ.get("HF_PSS_CACHE") or Path.home() / ".cache" / "hf_pss"
    folder = Path(cache, f"corpus-{fingerprint[:16]}")
    if not folder.is_dir():
        _fill_atomically(folder, sources, options, progress or (lambda text: None))
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokens = {part: np.load(folder / f"{part}.npy") for part in ("train", "validation")}
    return Corpus(
        train=pack_blocks(tokens["train"], context_length=context_length),
        validation=pack_blocks(tokens["validation"], context_length=context_length),
        tokenizer=wrap_tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))),
        fingerprint=fingerprint,
        description=meta["description"],
        unigram_entropy_nats=unigram_entropy_nats(tokens["train"]),
    )


def read_library() -> tuple[list[str], list[str]]:
    """Return the texts of the library's training files and of its held-out files.

    Raises:
        ConfigurationError: The interpreter ships no sources.
    """
    held_out, kept = _split(_read_sources())
    return [source.text for source in kept], [source.text for source in held_out]


def _read_sources() -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            with suppress(UnicodeDecodeError):
                if text := path.read_bytes().decode("utf-8"):
                    sources.append(Source(path.relative_to(root).as_posix(), text))
    if not sources:
        raise ConfigurationError(
            f"Your interpreter ships no Python sources under {root}, so there is no built-in "
            "corpus. Give a text of your own."
        )
    return sorted(sources, key=lambda source: (source.rank, source.path))


def _fingerprint(sources: list[Source], options: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    versions = [_CACHE_VERSION, platform.python_version(), tokenizers.__version__]
    digest.update(json.dumps([versions, options], sort_keys=True).encode())
    for source in sources:
        digest.update(f"{source.path}\0{len(source.text)}\0{source.text}".encode())
    return digest.hexdigest()


def _fill_atomically(
    folder: Path, sources: list[Source], options: Mapping[str, Any], progress: Progress
) -> None:
    """Write the cache under a temporary name and rename it, so that no reader finds half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _fill(scratch, sources, progress, **options)
        scratch.rename(folder)
    except OSError:
        # Another process may have been faster. It has written the same corpus.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(
    folder: Path,
    sources: list[Source],
    progress: Progress,
    *,
    vocab_size: int,
    max_tokens: int | None,
) -> None:
    num_bytes = sum(len(source.text.encode()) for source in sources)
    size = f"{len(sources):,} files, {num_bytes / 1e6:.1f} MB"
    progress(f"training a tokenizer on Python's library ({size})")
    tokenizer = train_tokenizer(_last_texts(sources, _TOKENIZER_BYTES), vocab_size=vocab_size)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    progress(f"tokenising Python's library ({size})")
    held_out, kept = _split(sources)
    train = encode_documents((s.text for s in kept), tokenizer, max_tokens=max_tokens)
    validation = encode_documents((s.text for s in held_out), tokenizer)
    np.save(folder / "train.npy", train)
    np.save(folder / "validation.npy", validation)
    description = (
        f"Python {platform.python_version()} standard library: {size}, "
        f"{len(train):,} training and {len(validation):,} validation tokens"
    )
    meta = json.dumps({"description": description})
    (folder / "meta.json").write_text(meta, encoding="utf-8")


def _split(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    held_out = [source for source in sources if source.rank < _VALIDATION_FRACTION]
    return held_out, [source for source in sources if source.rank >= _VALIDATION_FRACTION]


def _last_texts(sources: list[Source], limit: int) -> Iterator[str]:
    # The sample comes from the end, because the held-out files come first and must not shape
    # the vocabulary.
    for source in reversed(sources):
        yield source.text
        limit -= len(source.text)
        if limit < 0:
            return
