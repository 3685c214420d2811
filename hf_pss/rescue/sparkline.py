"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["marks", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAD = "×"
_NOTHING = " "


def sparkline(
    points: Sequence[tuple[int, float | None]], *, steps: tuple[int, int], width: int = 60
) -> str:
    """Draw (step, value) in `width` characters, the largest value of each; × is NaN or inf.

    >>> sparkline([(1, 1.0), (2, 8.0), (3, float("nan"))], steps=(1, 3), width=3)
    '▁█×'

    Args:
        points: None where nothing was logged.
        steps: The first and the last.
        width: Characters.
    """
    first, last = steps
    span = max(1, last - first + 1)
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        if value is not None and first <= step <= last:
            columns[(step - first) * width // span].append(value)
    finite = [v for column in columns for v in column if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return "".join(_character(column, low, high) for column in columns)


def marks(steps: Sequence[int], sign: str, *, over: tuple[int, int], width: int = 60) -> str:
    """Draw a sign at each of the steps, to stand below a `sparkline`."""
    first, last = over
    span = max(1, last - first + 1)
    line = [_NOTHING] * width
    for step in steps:
        if first <= step <= last:
            line[(step - first) * width // span] = sign
    return "".join(line)


def _character(values: Sequence[float], low: float, high: float) -> str:
    if not values:
        return _NOTHING
    if not all(map(math.isfinite, values)):
        return _BAD
    # Halves, so that the difference of the largest floats is finite.
    share = (max(values) / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]
