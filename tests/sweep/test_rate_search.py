"""The search for the best rate: it ends with the best inside, and goes on from any rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from preloaded import start
from rich.console import Console
from small_library import small_library
from sweep_cells import TINY, rows_in
from sweep_rows import row

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.grid import Cell, read_grid
from hf_pss.evidence.rate_search import next_cells
from hf_pss.evidence.rows import Row, append_row
from hf_pss.evidence.runner import ROWS_FILE, run_sweep

PROGRAM = Path(__file__).with_name("sweep_process.py")
GRID = f"""
recipes: [slow_damage_tiny]
learning_rates: {{around: 4e-3}}
guards: [clip]
seeds: 3
changes: {TINY}
"""


def read(folder: Path, text: str = GRID) -> list[Cell]:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def walk(
    cells: list[Cell], loss: Callable[[float], float | None], rows: dict[str, Row] | None = None
) -> list[tuple[int, float]]:
    """Run a search on a known curve, and return seed and rate of its runs, in their order."""
    rows, tried = dict(rows or {}), []
    while todo := next_cells(cells, rows):
        for cell in todo:
            assert cell.search_seed is None
            tried.append((cell.seed, cell.learning_rate))
            found = row(rate=cell.learning_rate, seed=cell.seed, loss=loss(cell.learning_rate))
            rows[cell.id] = replace(found, id=cell.id)
    return tried


def valley(best: float) -> Callable[[float], float]:
    return lambda rate: abs(math.log2(rate / best))


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3]),
        (8e-3, [2e-3, 4e-3, 8e-3, 1.6e-2]),
        (1e-3, [2e-3, 4e-3, 8e-3, 1e-3, 5e-4]),
    ],
)
def test_it_walks_until_the_best_is_inside(tmp_path: Path, best: float, rates: list[float]) -> None:
    tried = walk(read(tmp_path), valley(best))
    assert [rate for seed, rate in tried if seed == 0] == rates
    for other in (1, 2):
        assert [rate for seed, rate in tried if seed == other] == [best / 2, best, best * 2]


def test_runs_that_diverged_are_the_worst(tmp_path: Path) -> None:
    tried = walk(read(tmp_path), lambda rate: None if rate > 1e-3 else valley(1e-3)(rate))
    assert [rate for seed, rate in tried if seed == 1] == [5e-4, 1e-3, 2e-3]


def test_a_curve_without_a_valley_ends(tmp_path: Path) -> None:
    assert len(walk(read(tmp_path), lambda rate: rate)) <= 3 * (8 + 3)
    assert len(walk(read(tmp_path), lambda rate: None)) <= 3 * (8 + 3)


def test_each_guard_and_recipe_walks_by_itself(tmp_path: Path) -> None:
    text = GRID.replace("[clip]", "[clip, floor]").replace("_tiny]", "_tiny, llama]")
    cells = read(tmp_path, text)
    assert len(next_cells(cells, {})) == 3 * 4
    assert len({cell.id for cell in next_cells(cells, {})}) == 3 * 4


def rows_at(folder: Path, losses: dict[float, float]) -> dict[str, Row]:
    """Return rows of the first seed."""
    cells = read(folder, GRID.replace("{around: 4e-3}", str(list(losses))))
    found = [cell for cell in cells if cell.seed == 0]
    return {c.id: replace(row(loss=losses[c.learning_rate]), id=c.id) for c in found}


def test_rows_of_an_earlier_grid_are_used(tmp_path: Path) -> None:
    """The best row is far from the middle, so the search continues there."""
    rows = rows_at(tmp_path, {2e-3: 3.0, 4e-3: 2.0, 8e-3: 1.0, 6.4e-2: 0.0})
    assert [c.learning_rate for c in next_cells(read(tmp_path), rows)] == [3.2e-2, 0.128]


def test_it_waits_for_the_runs_in_the_middle(tmp_path: Path) -> None:
    rows = rows_at(tmp_path, {8e-3: 3.0})
    assert [c.learning_rate for c in next_cells(read(tmp_path), rows)] == [2e-3, 4e-3]


def test_a_search_and_a_list_of_the_same_rate_are_both_kept(tmp_path: Path) -> None:
    both = "".join(
        f"- {{recipes: [wide], guards: [clip], learning_rates: {rates}}}\n"
        for rates in ("{around: 4e-3}", "[4e-3]")
    )
    cells = read(tmp_path, both)
    assert len(cells) == 2
    assert len(next_cells(cells, {})) == 3


def test_a_misspelt_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`learning_rates` of a grid is a list"):
        read(tmp_path, GRID.replace("around", "near"))


def test_a_sweep_goes_on_to_the_other_seeds(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    out.mkdir()
    for one in rows_at(tmp_path, {2e-3: 100.0, 8e-3: 100.0}).values():
        append_row(out / ROWS_FILE, one)
    cells = read(tmp_path, GRID.replace("seeds: 3", "seeds: 2"))
    with start(PROGRAM, grid, out, small_library()) as sweep:
        told, errors = sweep.communicate()
    assert told == "finished", errors
    rows = rows_in(out)
    found = [(row.seed, row.learning_rate) for row in rows[2:]]
    assert found[0] == (0, 4e-3)
    assert sorted(found[1:]) == [(1, 2e-3), (1, 4e-3), (1, 8e-3)]
    assert run_sweep(cells, out, console=Console(quiet=True)) == "finished"
    assert rows_in(out) == rows
