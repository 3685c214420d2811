"""Numbers as people read them; a dash where there is none.

A curve in one line of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["count", "duration", "fixed", "marks", "percent", "significant", "sparkline"]

_NOTHING = "–"


def fixed(value: float, digits: int = 3) -> str:
    """Write a loss with a fixed number of decimals.

    >>> fixed(4.27), fixed(float("nan"))
    ('4.270', '–')
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else _NOTHING


def significant(value: float, digits: int = 3) -> str:
    """Write a number of unknown size: singular values, norms.

    >>> significant(12.3456), significant(1e30)
    ('12.3', '1.00e+30')
    """
    return f"{value:#.{digits}g}".removesuffix(".") if math.isfinite(value) else _NOTHING


def count(value: float) -> str:
    """Write a count, or a mean of counts.

    >>> count(3.0), count(1.5)
    ('3', '1.5')
    """
    if not math.isfinite(value):
        return _NOTHING
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def percent(ratio: float) -> str:
    """Write a ratio as a percentage with two decimals.

    >>> percent(0.0021)
    '0.21 %'
    """
    return f"{100 * ratio:.2f} %" if math.isfinite(ratio) else _NOTHING


def duration(seconds: float) -> str:
    """Write a time in its natural unit.

    >>> duration(54.6), duration(200), duration(7384)
    ('54.6 s', '3 min 20 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return _NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


_BLOCKS = "▁▂▃▄▅▆▇█"
_BAD = "×"
_EMPTY = " "


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
    line = [_EMPTY] * width
    for step in steps:
        if first <= step <= last:
            line[(step - first) * width // span] = sign
    return "".join(line)


def _character(values: Sequence[float], low: float, high: float) -> str:
    if not values:
        return _EMPTY
    if not all(map(math.isfinite, values)):
        return _BAD
    # Halves, so that the difference of the largest floats is finite.
    share = (max(values) / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]
