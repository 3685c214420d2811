"""The table of metrics agrees with the modules, with its own presets and with its document."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import hf_pss
from hf_pss.health.metrics import METRICS, PRESETS, metrics_of

CARD = Path(__file__).parents[2] / "docs" / "health.md"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_module_and_a_line_of_the_card(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    assert importlib.import_module(f"hf_pss.{metric.module}").__doc__
    lines = [line for line in CARD.read_text().splitlines() if line.startswith(f"| `{name}` ")]
    assert len(lines) == 1
    assert f"| {metric.cost} |" in lines[0]
    assert metric.unit.strip("1/") in lines[0]


def test_no_module_of_health_is_forgotten() -> None:
    folder = Path(hf_pss.__file__).parent / "health"
    known = {metric.module.removeprefix("health.") for metric in METRICS.values()}
    # Other ways to numbers that have a row; and what runs the others.
    no_rows = {"__init__", "metrics", "monitor", "capture", "verdicts"}
    no_rows |= {"spectral_norms", "subspace_rounds"}
    assert {path.stem for path in folder.glob("*.py")} - no_rows <= known


def test_each_preset_holds_the_one_before_it() -> None:
    light, standard, full = (set(PRESETS[cost]) for cost in ("light", "standard", "full"))
    assert light < standard < full == {name for name, row in METRICS.items() if row.in_runs}
    assert PRESETS["light"] == metrics_of("light")


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METRICS["stable_rank"] = METRICS["stable_rank"]  # type: ignore[index]
