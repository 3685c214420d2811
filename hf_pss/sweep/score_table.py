"""Scores of rules or metrics as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from hf_pss.inspection.names import visible

__all__ = ["score_table"]

_NUM_NAMES = 2


def score_table(columns: Sequence[str], lines: Iterable[Iterable[str]]) -> Table:
    """Return a table whose first two columns are names, and all others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        is_name = number < _NUM_NAMES
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for line in lines:
        # `Text`, because a name in square brackets would be taken for rich's markup.
        table.add_row(*(Text(visible(cell)) for cell in line))
    return table
