from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

from hf_pss.errors import ConfigurationError
from hf_pss.evidence import corpus as corpus_module
from hf_pss.evidence.corpus import build_corpus
from hf_pss.evidence.data import END_OF_TEXT


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of sixty small files, among them some that must not be read."""
    root = tmp_path / "lib"
    for i in range(60):
        write(root / f"module_{i}.py", f"def f_{i}(x):\n    return x + {i}\n" * 20)
    write(root / "site-packages" / "other.py", "foreign = True\n")
    write(root / "json" / "tests" / "test_json.py", "foreign = True\n")
    write(root / "empty.py", "")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def small(cache: Path, **options: object) -> corpus_module.Corpus:
    return build_corpus(**{"vocab_size": 300, "context_length": 16, "cache_dir": cache, **options})


def test_the_interpreters_own_library(tmp_path: Path) -> None:
    corpus = build_corpus(
        vocab_size=512, context_length=64, max_tokens=200_000, cache_dir=tmp_path / "cache"
    )
    assert len(corpus.train) == 200_000 // 64
    assert len(corpus.validation) > 100
    assert int(corpus.train.blocks.max()) < len(corpus.tokenizer) <= 512
    assert 3.0 < corpus.unigram_entropy_nats < 6.3
    batch = default_data_collator([corpus.train[0], corpus.train[1]])
    assert batch["labels"].shape == (2, 64)


def test_only_the_librarys_own_readable_files_are_in_it(library: Path, tmp_path: Path) -> None:
    corpus = small(tmp_path / "cache")
    text = corpus.tokenizer.decode(corpus.train.blocks.flatten())
    assert "foreign" not in text
    assert "latin" not in text
    assert END_OF_TEXT in text
    assert "60 files" in corpus.description


def test_validation_files_are_never_trained_on(library: Path, tmp_path: Path) -> None:
    corpus = small(tmp_path / "cache")
    names = [
        {
            line
            for line in corpus.tokenizer.decode(part.blocks.flatten()).splitlines()
            if "def" in line
        }
        for part in (corpus.train, corpus.validation)
    ]
    assert names[1]
    assert not names[0] & names[1]


def test_a_second_call_reads_the_cache(library: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = small(tmp_path / "cache", progress=said.append)
    assert len(said) == 2
    second = small(tmp_path / "cache", progress=said.append)
    assert len(said) == 2
    assert torch.equal(first.train.blocks, second.train.blocks)
    assert (first.fingerprint, first.description) == (second.fingerprint, second.description)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_two_cold_builds_agree(library: Path, tmp_path: Path) -> None:
    first, second = small(tmp_path / "one"), small(tmp_path / "two")
    assert torch.equal(first.train.blocks, second.train.blocks)
    assert torch.equal(first.validation.blocks, second.validation.blocks)


def test_the_context_length_needs_no_new_cache(library: Path, tmp_path: Path) -> None:
    small(tmp_path / "cache")
    longer = small(tmp_path / "cache", context_length=32)
    assert longer.train.blocks.shape[1] == 32
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("options", [{"vocab_size": 301}, {"max_tokens": 500}])
def test_other_options_are_another_corpus(
    options: dict[str, int], library: Path, tmp_path: Path
) -> None:
    first, second = small(tmp_path / "cache"), small(tmp_path / "cache", **options)
    assert first.fingerprint != second.fingerprint


def test_a_changed_source_is_another_corpus(library: Path, tmp_path: Path) -> None:
    first = small(tmp_path / "cache")
    write(library / "module_0.py", "changed = 1\n" * 20)
    assert small(tmp_path / "cache").fingerprint != first.fingerprint


def test_an_interrupted_build_leaves_nothing_half(library: Path, tmp_path: Path) -> None:
    def interrupt(message: str) -> None:
        if message.startswith("tokenising"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(small(tmp_path / "cache").train) > 0


def test_a_build_that_lost_the_race_uses_the_winners(library: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def race(message: str) -> None:
        if message.startswith("tokenising"):
            small(cache)

    loser = small(cache, progress=race)
    assert torch.equal(loser.train.blocks, small(cache).train.blocks)
    assert len(list(cache.iterdir())) == 1


def test_the_cache_follows_the_environment(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_PSS_CACHE", str(tmp_path / "elsewhere"))
    build_corpus(vocab_size=300, context_length=16)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_an_interpreter_without_sources_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigurationError, match="ships no Python sources"):
        small(tmp_path / "cache")


HEADER = "#ifndef H_{0}\n#define H_{0}\nint f_{0}(int x);\n#endif\n" * 20


def test_the_newest_packages_that_are_unpacked_are_read_without_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    root = tmp_path / "cache" / "packages"
    cgal = root / "libcgal-dev_1.10-3_all" / "usr"
    for i in range(200):
        write(cgal / "include" / f"f_{i}.h", HEADER.format(i))
    write(cgal / "share" / "other.h", "foreign")
    write(cgal / "include" / "other.txt", "foreign")
    write(root / "libcgal-dev_1.9-1_all" / "usr" / "include" / "old.h", "foreign")
    write(root / "libeigen3-dev_3.4-1_all" / "usr" / "include" / "e.h", HEADER.format(777))
    corpus = build_corpus("cpp", vocab_size=300, context_length=16, cache_dir=root.parent)
    text = corpus.tokenizer.decode(corpus.train.blocks.flatten())
    assert "f_777" in text
    assert "foreign" not in text
    assert "libcgal-dev 1.10-3, libeigen3-dev 3.4-1: 201 files" in corpus.description
    assert len(corpus.validation) > 0


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks a Debian package")
def test_the_newest_package_that_apt_serves_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs of apt are scripts that serve packages of this test; dpkg-deb is real."""
    for name in ("linux-doc-6.9", "linux-doc-6.12", "python3.11-doc"):
        root = tmp_path / name
        control = f"Package: {name}\nVersion: 1.5-2\nArchitecture: all\nMaintainer: us\n"
        write(root / "DEBIAN" / "control", control + "Description: text\n")
        for i in range(100):
            write(root / "usr" / "_sources" / f"{i}.txt", f"The text {i} of {name}. " * 9)
        write(root / "usr" / "_sources" / "translations" / "it.txt", "foreign")
        deb = tmp_path / f"{name}_1.5-2_all.deb"
        subprocess.run(["dpkg-deb", "-b", root, deb], check=True, capture_output=True)
    programs = tmp_path / "bin"
    names = "linux-doc linux-doc-6.9 linux-doc-6.12 linux-doc-6.99-x python3.11-doc bash"
    write(programs / "apt-cache", f"#!/bin/sh\nprintf '%s\\n' {names}\n")
    write(programs / "apt-get", f"#!/bin/sh\necho $2 >> {tmp_path}/got\ncp {tmp_path}/$2_* .\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    options = {"vocab_size": 300, "context_length": 16, "cache_dir": tmp_path / "cache"}
    corpus = build_corpus("english", **options)
    assert "linux-doc-6.12 1.5-2, python3.11-doc 1.5-2: 200 files" in corpus.description
    assert "foreign" not in corpus.tokenizer.decode(corpus.train.blocks.flatten())
    assert build_corpus("english", **options).fingerprint == corpus.fingerprint
    assert (tmp_path / "got").read_text().split() == ["linux-doc-6.12", "python3.11-doc"]


def test_a_machine_without_apt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match=r"'english' needs Debian packages.*apt-cache"):
        build_corpus("english", context_length=16, cache_dir=tmp_path)
