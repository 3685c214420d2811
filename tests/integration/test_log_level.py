"""The log of hf_pss follows the Trainer's log_level, and no line comes twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from helpers import gpt2, token_rows
from transformers import Trainer, TrainingArguments

from hf_pss import ConfigurationError, PSSCallback

OURS = logging.getLogger("hf_pss")
TABLE = "PSS watches these matrices"


@pytest.fixture(autouse=True)
def _same_levels_after() -> Iterator[None]:
    loggers = (OURS, logging.getLogger("transformers"))
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def train(
    folder: Path, handlers: Mapping[str, logging.Handler] = MappingProxyType({}), **options: str
) -> None:
    """Train in a program with these handlers alone, by the name of their logger."""
    args = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in {"", "hf_pss", *handlers}:
            own = [handlers[name]] if name in handlers else []
            patch.setattr(logging.getLogger(name), "handlers", own)
        Trainer(gpt2(), args, train_dataset=token_rows(), callbacks=[PSSCallback()]).train()


def test_log_level_info_shows_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, log_level="info")
    assert capsys.readouterr().err.count(TABLE) == 1
    assert OURS.level == logging.INFO


def test_the_level_of_the_logger_alone_shows_info(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OURS.setLevel(logging.INFO)
    train(tmp_path)
    assert capsys.readouterr().err.count(TABLE) == 1


def test_warnings_are_shown_once_and_info_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    shown = capsys.readouterr().err
    assert shown.count("PSS: preset anchored") == 1
    assert TABLE not in shown


@pytest.mark.parametrize("name", ["", "hf_pss", "hf_pss.trainer.callback"])
def test_a_handler_of_the_user_gets_every_line_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
    train(tmp_path, {name: handler}, log_level="info")
    assert sum(TABLE in line for line in seen) == 1
    assert TABLE not in capsys.readouterr().err


def test_options_that_are_no_config_are_refused_when_the_callback_is_built() -> None:
    with pytest.raises(ConfigurationError, match=r"PSSConfig\.preset\('floor'\); you gave 'floor'"):
        PSSCallback("floor")  # type: ignore[arg-type]
