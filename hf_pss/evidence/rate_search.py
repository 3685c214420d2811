"""Choose which runs of a grid come next, so that the best rate of each guard is inside its grid.

If a grid gives ``learning_rates: {around: 4e-3}``, `next_cells` chooses the rates. Each recipe,
optimizer and guard has its own search:

1. The first seed runs at the given rate, at half of it and at twice it.
2. The first seed runs at further rates, until both neighbours of its best rate have been tried.
3. The other seeds run at this best rate and its two neighbours only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from hf_pss.evidence.grid import Cell
from hf_pss.evidence.rows import Row

_MAX_DOUBLINGS = 8


def next_cells(cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[Cell]:
    """Return the cells that can be run now and have no row yet.

    The result depends on the rows alone, so a sweep that was killed continues where it stopped.

    Args:
        cells: The grid. A cell with a `search_seed` stands for the runs of its seed in a search
            around its rate.
        rows: The rows of runs that did not fail, by the id of the cell.
    """
    wanted: dict[str, Cell] = {}
    for cell in cells:
        for one in [cell] if cell.search_seed is None else _searched(cell, rows, cell.search_seed):
            wanted.setdefault(one.id, one)
    return [cell for id, cell in wanted.items() if id not in rows]


def _searched(cell: Cell, rows: Mapping[str, Row], first_seed: int) -> Collection[Cell]:
    doublings = range(-_MAX_DOUBLINGS, _MAX_DOUBLINGS + 1)
    first = {n: _at(cell, n, first_seed) for n in doublings}
    losses = {n: _loss(rows[one.id]) for n, one in first.items() if one.id in rows}
    # Runs end in any order. The search must not leave the middle while a run there is under way.
    is_begun = all(n in losses for n in (-1, 0, 1))
    best = min(losses, key=losses.__getitem__) if is_begun else 0
    around = [n for n in (best - 1, best, best + 1) if n in first]
    if cell.seed == first_seed:
        return [first[n] for n in around]
    is_found = all(n in losses for n in around)
    return [_at(cell, n, cell.seed) for n in around] if is_found else []


def _at(cell: Cell, doublings: int, seed: int) -> Cell:
    recipe = replace(cell.recipe, learning_rate=cell.learning_rate * 2.0**doublings)
    return replace(cell, recipe=recipe, seed=seed, search_seed=None)


def _loss(row: Row) -> float:
    return math.inf if row.final_eval_loss is None else row.final_eval_loss
