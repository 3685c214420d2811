"""A small part of Python's library, for tests that train on the built-in corpus.

To read and tokenise all of it takes seconds; ``demo/test_corpus.py`` does it once.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import pytest

_PARTS = ("asyncio", "collections", "email", "html", "http", "importlib", "json", "logging")
_PARTS += ("multiprocessing", "unittest", "urllib", "xml")

_FOLDER = tempfile.TemporaryDirectory(prefix="hf_pss-tests-corpus-")


@cache
def small_library() -> Path:
    """Return its folder, made once a session."""
    whole, root = Path(sysconfig.get_paths()["stdlib"]), Path(_FOLDER.name, "library")
    for part in _PARTS:
        shutil.copytree(whole / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def corpus_cache() -> Path:
    """Return the folder where the session's corpora are kept."""
    return Path(_FOLDER.name, "cache")


def use_small_library(patch: pytest.MonkeyPatch) -> None:
    """Have the built-in corpus made of it, in this process, its forks and those that it starts."""
    paths = {**sysconfig.get_paths(), "stdlib": str(small_library())}
    patch.setattr(sysconfig, "get_paths", lambda: paths)
    patch.setenv("HF_PSS_CACHE", str(corpus_cache()))
    # What every new interpreter imports.
    site = Path(_FOLDER.name, "site")
    site.mkdir(exist_ok=True)
    text = f"import sysconfig\npaths = {paths}\nsysconfig.get_paths = lambda *_: paths\n"
    (site / "sitecustomize.py").write_text(text, encoding="utf-8")
    patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
