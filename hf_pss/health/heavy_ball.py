"""How near the sharpest curvature comes to where momentum's two modes coalesce."""

from __future__ import annotations

import math

from hf_pss.errors import ConfigurationError

__all__ = ["exceptional_distance", "exceptional_points"]


def exceptional_points(lr: float, beta: float) -> tuple[float, float]:
    """Return λ* = (1 ∓ √β)²/η, the curvatures at which heavy ball's modes coalesce.

    There the companion matrix [[1 + β − ηλ, −β], [1, 0]] of x ← x − ηλx + β(x − x₋₁) has a double
    eigenvalue and one eigenvector, and κ(V) is infinite (arXiv 2605.23476). Between the two the
    mode oscillates; stability ends at 2(1 + β)/η, above both.

    Args:
        lr: η; with torch's SGD the learning rate times (1 − dampening).
        beta: Momentum, in [0, 1).

    Returns:
        The lower and the upper one, in units of the Hessian's eigenvalues.

    Raises:
        ConfigurationError: A number outside of its range.

    >>> exceptional_points(0.5, 0.25)
    (0.5, 4.5)
    """
    if not (0 < lr < math.inf and 0 <= beta < 1):
        raise ConfigurationError(
            f"You gave lr={lr}, beta={beta}; give a rate above 0 and a momentum in [0, 1)."
        )
    root = math.sqrt(beta)
    return (1 - root) ** 2 / lr, (1 + root) ** 2 / lr


def exceptional_distance(curvature: float, lr: float, beta: float) -> float:
    """Return min |λ − λ*|/λ* over both exceptional points, without unit; dividing by λ* is ours.

    Args:
        curvature: λ, an eigenvalue of the Hessian, for instance the largest.
        lr: As in `exceptional_points`.
        beta: As there.

    >>> round(exceptional_distance(4.05, 0.5, 0.25), 3)
    0.1
    """
    distances = [abs(curvature - point) / point for point in exceptional_points(lr, beta)]
    return math.nan if math.isnan(curvature) else min(distances)
