"""The table of metrics agrees with its document."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_pss.health.metrics import METRICS

CARD = Path(__file__).parents[2] / "docs" / "health.md"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_line_of_the_card(name: str) -> None:
    lines = [line for line in CARD.read_text().splitlines() if line.startswith(f"| `{name}` ")]
    assert len(lines) == 1
    assert f"| {METRICS[name].cost} |" in lines[0]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METRICS["stable_rank"] = METRICS["stable_rank"]  # type: ignore[index]
