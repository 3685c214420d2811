"""Attention logits of the health monitor: what they cost, and what is said when they fail."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gpt2, make_trainer, train
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from hf_pss import PSSCallback, PSSConfig
from hf_pss.trainer import attention_maxima as module
from hf_pss.trainer.attention_maxima import AttentionMaxima, attention_watch

DELAY_SECONDS = 0.2  # far more than all else that health does here


def refuse(*args: object, **named: object) -> None:
    raise RuntimeError("a release of tomorrow")


@pytest.mark.parametrize("health", ["light", "full"])
def test_only_full_asks_and_no_error_ends_a_run(
    tmp_path: Path,
    health: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_pss.trainer.attention_maxima.find_heads", refuse)
    config = PSSConfig.preset("paper", health=health, health_every_steps=2)
    trainer = train(tmp_path, config, save_strategy="no")
    told = [r for r in caplog.records if "a release of tomorrow" in r.getMessage()]
    assert len(told) == (health == "full")
    matrices = PSSCallback.of(trainer).last_health.matrices
    assert "attention_logit_max" not in matrices
    assert ("token_cosine" in matrices) == (health == "full")


def test_a_model_that_cannot_be_measured_is_one_warning_without_advice_on_qk_clip(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=32))
    start = attention_watch(model)
    assert [start()(), start()()] == [({}, 0.0)] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "attention_logit_max is not measured" in record.getMessage()
    assert "AttentionInterface" in record.getMessage()
    assert "qk_clip" not in record.getMessage()


def test_a_call_that_cannot_be_read_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_pss.trainer.attention_maxima._counted", refuse)
    model = gpt2().train()
    start = attention_watch(model)
    for _ in range(2):
        stop = start()
        model(torch.zeros(1, 4, dtype=torch.long))
        assert stop() == ({}, 0.0)
    assert len(caplog.records) == 1


def test_the_seconds_of_logits_are_healths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = AttentionMaxima.see

    def slow(self: AttentionMaxima, called: nn.Module, *args: Any, **named: Any) -> None:
        time.sleep(DELAY_SECONDS)
        own(self, called, *args, **named)

    monkeypatch.setattr(module._QuietMaxima.__mro__[1], "see", slow)
    config = PSSConfig.preset("paper", health="full", health_every_steps=2)
    trainer = make_trainer(tmp_path, config, max_steps=4, save_strategy="no")
    trainer.train()
    assert PSSCallback.of(trainer).controller.health.seconds > 2 * DELAY_SECONDS
    assert PSSCallback.of(trainer).last_health.matrices["attention_logit_max"]
