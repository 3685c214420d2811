"""The table of metrics agrees with its own presets and with its document."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_pss.health.metrics import METRICS, PRESETS

CARD = Path(__file__).parents[2] / "docs" / "health.md"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_line_of_the_card(name: str) -> None:
    lines = [line for line in CARD.read_text().splitlines() if line.startswith(f"| `{name}` ")]
    assert len(lines) == 1
    assert f"| {METRICS[name].cost} |" in lines[0]


def test_each_preset_holds_the_one_before_it() -> None:
    light, standard, full = (set(PRESETS[cost]) for cost in ("light", "standard", "full"))
    assert light < standard < full == {name for name, row in METRICS.items() if row.in_runs}
    assert PRESETS["light"][:2] == ("spectral_norm", "stable_rank")


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METRICS["stable_rank"] = METRICS["stable_rank"]  # type: ignore[index]
