"""Where the stable-rank floor of each matrix lies."""

from __future__ import annotations

from collections.abc import Mapping

from hf_pss.linalg import noise_stable_rank

__all__ = ["floors_at", "starting_ranks"]

Shapes = Mapping[str, tuple[int, int]]


def starting_ranks(shapes: Shapes, measured: Mapping[str, float]) -> dict[str, float]:
    """Return the stable rank that each floor refers to: the matrix's own, at most that of noise.

    >>> starting_ranks({"low": (64, 64), "zero": (64, 64)}, {"low": 9.0, "zero": 0.0})
    {'low': 9.0, 'zero': 16.0}

    Args:
        shapes: (m, n) of each matrix, by name.
        measured: Their stable ranks when PSS began.
    """
    noise = _of_noise(shapes)
    # Zero (a zero-initialised projection) and NaN say nothing about a healthy level.
    own = {name: rank for name, rank in measured.items() if 0 < rank < noise[name]}
    return {**noise, **own}


def floors_at(ratio: float, shapes: Shapes, starts: Mapping[str, float]) -> dict[str, float]:
    """Return ρ times each starting stable rank; ρ times that of noise where there is none.

    >>> floors_at(0.5, {"low": (64, 64), "new": (64, 64)}, {"low": 9.0})
    {'low': 4.5, 'new': 8.0}
    """
    return {name: ratio * rank for name, rank in {**_of_noise(shapes), **starts}.items()}


def _of_noise(shapes: Shapes) -> dict[str, float]:
    return {name: noise_stable_rank(m, n) for name, (m, n) in shapes.items()}
