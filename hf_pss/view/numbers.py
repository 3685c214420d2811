"""Write numbers for people, with a dash for a missing number."""

from __future__ import annotations

import math

__all__ = ["NOTHING", "count", "duration", "fixed", "percent", "plural", "significant"]

NOTHING = "–"


def fixed(value: float, digits: int = 3) -> str:
    """Write a loss with a fixed number of decimals.

    >>> fixed(4.27), fixed(float("nan"))
    ('4.270', '–')
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else NOTHING


def significant(value: float, digits: int = 3) -> str:
    """Write a number of unknown size: singular values, norms.

    >>> significant(12.3456), significant(1e30)
    ('12.3', '1.00e+30')
    """
    return f"{value:#.{digits}g}".removesuffix(".") if math.isfinite(value) else NOTHING


def count(value: float) -> str:
    """Write a count, or a mean of counts.

    >>> count(3.0), count(1.5)
    ('3', '1.5')
    """
    if not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def plural(number: float, one: str, many: str | None = None) -> str:
    """Write how many things there are.

    >>> plural(1, "seed"), plural(1200, "matrix", "matrices")
    ('1 seed', '1,200 matrices')
    """
    return f"{number:,.0f} {one if number == 1 else many or one + 's'}"


def percent(ratio: float) -> str:
    """Write a ratio as a percentage with two decimals.

    >>> percent(0.0021)
    '0.21 %'
    """
    return f"{100 * ratio:.2f} %" if math.isfinite(ratio) else NOTHING


def duration(seconds: float) -> str:
    """Write a time in its natural unit.

    >>> duration(54.6), duration(200), duration(7384)
    ('54.6 s', '3 min 20 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
