"""Tables for a terminal, and curves as one line of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from hf_pss.records.strict_json import visible

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAD = "×"
_EMPTY = " "


def lean_table(
    names: Iterable[str],
    numbers: Iterable[str] = (),
    notes: Iterable[str] = (),
    *,
    rows: Iterable[Iterable[str]] = (),
    title: str | None = None,
) -> Table:
    """Return a table without lines, narrow enough for a terminal of 80 columns.

    Args:
        names: Titles of the first columns, whose text may be folded.
        numbers: Titles of the columns of numbers, which are right-aligned and never broken.
        notes: Titles of the last columns, whose text may be folded.
        rows: Cells, which are shown as plain text and never as rich's markup. Give none to add
            the rows yourself.
        title: A title above the table.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        # In a narrow terminal rich would shrink foldable columns to nothing.
        table.add_column(Text(name), overflow="fold", min_width=10)
    for name in numbers:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for name in notes:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def sparkline(
    points: Sequence[tuple[int, float | None]], *, steps: tuple[int, int], width: int = 60
) -> str:
    """Draw one character for the largest value of each column; × stands for NaN or inf.

    >>> sparkline([(1, 1.0), (2, 8.0), (3, float("nan"))], steps=(1, 3), width=3)
    '▁█×'

    Args:
        points: Steps and values. A value is None if the step has none.
        steps: The first and the last step.
        width: Number of characters.
    """
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        column = _column(step, steps, width)
        if value is not None and column is not None:
            columns[column].append(value)
    finite = [v for column in columns for v in column if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return "".join(_character(column, low, high) for column in columns)


def marks(steps: Sequence[int], sign: str, *, over: tuple[int, int], width: int = 60) -> str:
    """Draw a sign at each of the steps, for a line below a `sparkline`."""
    line = [_EMPTY] * width
    for step in steps:
        column = _column(step, over, width)
        if column is not None:
            line[column] = sign
    return "".join(line)


def _column(step: int, limits: tuple[int, int], width: int) -> int | None:
    """Return the column of a step; None if the step is outside the limits."""
    first, last = limits
    return (step - first) * width // max(1, last - first + 1) if first <= step <= last else None


def _character(values: Sequence[float], low: float, high: float) -> str:
    if not values:
        return _EMPTY
    if not all(map(math.isfinite, values)):
        return _BAD
    # Halved values keep the difference of the largest floats finite.
    share = (max(values) / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]
