"""The section about PSS in the model card, of local runs without a hub."""

from __future__ import annotations

from pathlib import Path

from helpers import EAGER, train

from hf_pss import PSSConfig

HEADING = "### Parametric Singularity Smoothing"


def test_the_card_has_options_and_events_once(tmp_path: Path) -> None:
    trainer = train(tmp_path, EAGER, save_strategy="no")
    for _ in range(2):
        trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count(HEADING) == 1
    assert "preset paper with threshold_ratio=1.0001" in card
    assert "- spike, smoothed: " in card


def test_a_run_that_only_observes_has_the_plain_card(tmp_path: Path) -> None:
    config = PSSConfig.preset("anchored", observe_only=True)
    trainer = train(tmp_path, config, save_strategy="no")
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# tiny" in card
    assert HEADING not in card
