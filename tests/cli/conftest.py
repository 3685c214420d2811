from __future__ import annotations

from pathlib import Path

import datasets
import huggingface_hub
import pytest
from commandline import PROSE, SHORT, TINY, Run
from small_library import use_small_library
from typer.testing import CliRunner

from hf_pss.cli.app import app


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use_small_library(monkeypatch)
    monkeypatch.delenv("HF_PSS_DEBUG", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def run() -> Run:
    """Run `hf-pss` with these words in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def train(run: Run) -> Run:
    """Run five steps of a tiny model."""
    return lambda *words: run("train", *TINY, *SHORT, *words)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path
