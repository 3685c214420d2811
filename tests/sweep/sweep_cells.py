"""Cells that train in a second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_pss.evidence.grid import Cell
from hf_pss.evidence.recipes import RECIPES, Fault
from hf_pss.evidence.rows import Row, read_rows

TINY = {
    "num_layers": 1,
    "width": 16,
    "num_heads": 2,
    "num_steps": 4,
    "num_eval_blocks": 4,
    "vocab_size": 300,
    "context_length": 32,
    "batch_size": 4,
    "eval_every_steps": 2,
}
GRID = f"""
recipes: [slow_damage_tiny]
learning_rates: [1e-3]
guards: [none, clip]
seeds: 2
changes: {TINY}
"""


def cell(guard: str = "none", *, fault: Fault | None = None, seed: int = 0, **more: Any) -> Cell:
    probes, name = more.pop("probes_every_steps", 0), more.pop("recipe", "slow_damage_tiny")
    optimizer = more.pop("optimizer", "adamw")
    recipe = RECIPES[name].with_changes({**TINY, **more, "learning_rate": 1e-3})
    return Cell(
        recipe_name=name,
        recipe=replace(recipe, fault=fault),
        optimizer=optimizer,
        guard_name=guard,
        seed=seed,
        probes_every_steps=probes,
    )


def rows_in(folder: Path) -> list[Row]:
    return list(read_rows(folder / "rows.jsonl"))


def ids(rows: Iterable[Row]) -> list[str]:
    return sorted(row.id for row in rows)
