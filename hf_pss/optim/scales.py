"""Update scales: the factor on an orthogonal update, by the formula that it is named after."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["UPDATE_SCALES"]

UPDATE_SCALES: Mapping[str, Callable[[int, int], float]] = {
    "aspect_clamped": lambda m, n: max(1.0, m / n) ** 0.5,
    "rms_match": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "aspect": lambda m, n: (m / n) ** 0.5,
    "max_dim": lambda m, n: max(m, n) ** 0.5,
}
"""Of an m × n matrix, m outputs and n inputs.

`aspect_clamped`: K. Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch's "original".
`rms_match`: Liu et al. 2025, arXiv 2502.16982; an orthogonal m × n matrix has the root mean square
max(m, n)^-½, so the update's is 0.2, about AdamW's, and AdamW's learning rate carries over; torch's
"match_rms_adamw". `aspect`: Bernstein 2025, jeremybernste.in/writing/deriving-muon; the update's
operator norm between root mean squares is 1. `max_dim`: the update's root mean square is 1.
"""
