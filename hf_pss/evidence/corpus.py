"""Build the built-in corpora: the interpreter's Python sources, and texts of Debian packages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
class _DebianTexts:
    """Some files of the newest Debian packages whose names match."""

    packages: tuple[str, ...]
    """Regular expressions for names of packages. Each stands for one package."""
    folder: str
    """Only files below a folder of this name are read."""
    suffix: str
    skipped: frozenset[str] = frozenset()
    """Folders that are not read."""


_DEBIAN = {
    # Documentation of the Linux kernel and of Python, without translations.
    "english": _DebianTexts(
        packages=(r"linux-doc-[\d.]+", r"python3\.\d+-doc"),
        folder="_sources",
        suffix=".txt",
        skipped=frozenset({"translations"}),
    ),
    # Headers of CGAL and Eigen, which people wrote. Boost's are in large part generated.
    "cpp": _DebianTexts(packages=("libcgal-dev", "libeigen3-dev"), folder="include", suffix=".h"),
}
CORPORA = ("python", *_DEBIAN, "digits")
"""``python`` is the standard library of the interpreter. ``english`` and ``cpp`` come from Debian
packages. ``digits`` are the images of scikit-learn, which `build_corpus` does not read."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, its path relative to the root of its library or package."""

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
    """One line for people: versions, files, bytes, tokens."""
    unigram_entropy_nats: float
    """Loss of a model that predicts the token frequencies of the training text."""


def build_corpus(
    name: str = "python",
    *,
    vocab_size: int = 2048,
    context_length: int,
    max_tokens: int | None = 4_000_000,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenise a corpus, or read the tokens from the cache of an earlier call.

    A hash of their path selects about 5 % of the files for validation. The first call for a corpus
    of Debian packages downloads them with ``apt-get download`` and unpacks them into the cache.

    Args:
        name: ``python``, ``english`` or ``cpp``; see `CORPORA`.
        vocab_size: Number of tokens of the byte-level BPE that is trained on the corpus.
        context_length: Tokens per block.
        max_tokens: Largest number of training tokens. With None there is no limit.
        cache_dir: Folder of the cache. None means ``HF_PSS_CACHE``, or ``~/.cache/hf_pss``.
        progress: Receives a short description of each step of the work, if the cache
            lacks the tokens.

    Raises:
        ConfigurationError: The interpreter ships no sources, apt does not serve a package, or an
            option leaves no block.
    """
    cache = cache_dir or cache_folder()
    if name in _DEBIAN:
        title, sources = _read_packages(name, cache / "packages")
    else:
        title, sources = f"Python {platform.python_version()} standard library", _read_sources()
    options: dict[str, Any] = {"vocab_size": vocab_size, "max_tokens": max_tokens}
    fingerprint = _fingerprint(sources, options)
    folder = cache / f"corpus-{fingerprint[:16]}"
    if not folder.is_dir():
        _fill_atomically(folder, title, sources, options, progress or (lambda text: None))
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


def cache_folder() -> Path:
    """Return the folder for corpora and weights: ``HF_PSS_CACHE``, or ``~/.cache/hf_pss``."""
    return Path(os.environ.get("HF_PSS_CACHE") or Path.home() / ".cache" / "hf_pss")


def read_library() -> tuple[list[str], list[str]]:
    """Return the texts of the library's training files and of its held-out files.

    Raises:
        ConfigurationError: The interpreter ships no sources.
    """
    held_out, kept = _split(_read_sources())
    return [source.text for source in kept], [source.text for source in held_out]


def _read_sources() -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = list(_read_files(root, suffix=".py", skipped=_SKIPPED_FOLDERS))
    if not sources:
        raise ConfigurationError(
            f"Your interpreter ships no Python sources under {root}, so there is no built-in "
            "corpus. Give a text of your own."
        )
    return _in_order(sources)


def _in_order(sources: Iterable[Source]) -> list[Source]:
    return sorted(sources, key=lambda source: (source.rank, source.path))


def _read_files(
    root: Path, *, suffix: str, skipped: Collection[str], inside: str | None = None
) -> Iterator[Source]:
    """Yield the files that are UTF-8 and not empty, below a folder with the name `inside`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - set(skipped)
        relative = Path(folder).relative_to(root)
        if inside is not None and inside not in relative.parts:
            continue
        for name in names:
            if name.endswith(suffix):
                with suppress(UnicodeDecodeError):
                    if text := Path(folder, name).read_bytes().decode("utf-8"):
                        yield Source((relative / name).as_posix(), text)


def _read_packages(name: str, folder: Path) -> tuple[str, list[Source]]:
    """Return the packages' names with versions, and their texts."""
    texts = _DEBIAN[name]
    try:
        roots = [_unpacked(pattern, folder) for pattern in texts.packages]
    except (OSError, LookupError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        raise ConfigurationError(
            f"The corpus {name!r} needs Debian packages, but apt did not deliver them: {reason}. "
            f"Run `apt-get update`, or copy {folder} from a machine that has built this corpus."
        ) from error
    suffix, skipped, inside = texts.suffix, texts.skipped, texts.folder
    found = [
        source
        for root in roots
        for source in _read_files(root, suffix=suffix, skipped=skipped, inside=inside)
    ]
    title = ", ".join(" ".join(root.name.split("_")[:2]) for root in roots)
    return f"Debian packages {title}", _in_order(found)


def _unpacked(pattern: str, folder: Path) -> Path:
    """Return the unpacked package, named NAME_VERSION_ARCHITECTURE; download it the first time."""
    if folder.is_dir():
        kept = [path for path in folder.iterdir() if re.fullmatch(f"{pattern}_.+", path.name)]
        if kept:
            return max(kept, key=_version)
    names = [name for name in _run("apt-cache", "pkgnames") if re.fullmatch(pattern, name)]
    if not names:
        raise LookupError(f"apt knows no package {pattern}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run("apt-get", "download", max(map(Path, names), key=_version).name, cwd=scratch)
        (package,) = Path(scratch).glob("*.deb")
        _run("dpkg-deb", "-x", str(package), f"{scratch}/files")
        unpacked = folder / package.stem
        try:
            Path(scratch, "files").rename(unpacked)
        except OSError:
            # Another process may have been faster. It has unpacked the same files.
            if not unpacked.is_dir():
                raise
    return unpacked


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _run(*command: str, cwd: str | None = None) -> list[str]:
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def _fingerprint(sources: list[Source], options: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    versions = [_CACHE_VERSION, platform.python_version(), tokenizers.__version__]
    digest.update(json.dumps([versions, options], sort_keys=True).encode())
    for source in sources:
        digest.update(f"{source.path}\0{len(source.text)}\0{source.text}".encode())
    return digest.hexdigest()


def _fill_atomically(
    folder: Path,
    title: str,
    sources: list[Source],
    options: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the cache under a temporary name and rename it, so that no reader finds half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _fill(scratch, title, sources, progress, **options)
        scratch.rename(folder)
    except OSError:
        # Another process may have been faster. It has written the same corpus.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(
    folder: Path,
    title: str,
    sources: list[Source],
    progress: Progress,
    *,
    vocab_size: int,
    max_tokens: int | None,
) -> None:
    num_bytes = sum(len(source.text.encode()) for source in sources)
    size = f"{len(sources):,} files, {num_bytes / 1e6:.1f} MB"
    progress(f"training a tokenizer on {title} ({size})")
    tokenizer = train_tokenizer(_last_texts(sources, _TOKENIZER_BYTES), vocab_size=vocab_size)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    progress(f"tokenising {title} ({size})")
    held_out, kept = _split(sources)
    train = encode_documents((s.text for s in kept), tokenizer, max_tokens=max_tokens)
    validation = encode_documents((s.text for s in held_out), tokenizer)
    np.save(folder / "train.npy", train)
    np.save(folder / "validation.npy", validation)
    description = (
        f"{title}: {size}, {len(train):,} training and {len(validation):,} validation tokens"
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
