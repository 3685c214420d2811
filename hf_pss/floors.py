"""Where the stable-rank floor of each matrix lies, and whether weights look trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from hf_pss.linalg import noise_stable_rank

__all__ = ["floors_at", "looks_trained", "starting_ranks"]

Shapes = Mapping[str, tuple[int, int]]

# Median stable rank in units of noise: 1.03 to 1.09 for the fresh weights of seven architectures,
# 0.34 for SmolLM2-135M (docs/experiments.md, 2026-11-30).
_TRAINED_BELOW = 0.8
# A trained matrix may lose so much of its stable rank in a sound fine-tuning.
_TRAINED_SHARE = 0.5


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


def looks_trained(shapes: Shapes, ranks: Mapping[str, float]) -> bool:
    """Tell whether weights have been trained: far more singular than noise, by the median [ours].

    >>> looks_trained({"a": (64, 64), "b": (64, 64)}, {"a": 4.0, "b": 9.0})
    True

    Args:
        shapes: (m, n) of each matrix, by name.
        ranks: Their stable ranks; zero, NaN and other names are passed over.
    """
    measured = {name: ranks.get(name, 0.0) / rank for name, rank in _of_noise(shapes).items()}
    shares = [share for share in measured.values() if 0 < share < math.inf]
    return bool(shares) and median(shares) < _TRAINED_BELOW


def floors_at(ratio: float, shapes: Shapes, starts: Mapping[str, float]) -> dict[str, float]:
    """Return the floor of each matrix: ρ times its starting stable rank.

    For weights that look trained it is ρ/2 times that: what they know lies in their leading
    directions, so only a collapse is to be held up. Without starting ranks it is ρ times that of
    noise.

    >>> floors_at(0.5, {"fresh": (64, 64), "new": (64, 64)}, {"fresh": 15.0})
    {'fresh': 7.5, 'new': 8.0}
    >>> floors_at(1.0, {"trained": (64, 64)}, {"trained": 5.0})
    {'trained': 2.5}
    """
    if looks_trained(shapes, starts):
        ratio *= _TRAINED_SHARE
    return {name: ratio * rank for name, rank in {**_of_noise(shapes), **starts}.items()}


def _of_noise(shapes: Shapes) -> dict[str, float]:
    return {name: noise_stable_rank(m, n) for name, (m, n) in shapes.items()}
