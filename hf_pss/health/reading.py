"""What a look at a model's health found at one step: plain numbers, for whoever reports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["HealthReading"]


@dataclass(frozen=True, slots=True)
class HealthReading:
    """All that was measured at one step. Numbers may be NaN or inf: a broken matrix is news."""

    step: int
    """Optimizer steps done."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """One number for the whole model by a metric's name, or by metric and summary:
    ``stable_rank/min``."""
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By a metric's name, one number for each matrix by its name."""
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values in descending order by the matrix's name, at the steps that sample them."""
