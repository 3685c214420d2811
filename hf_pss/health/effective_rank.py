"""Effective rank of every selected matrix: the exponential of its spectrum's entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from hf_pss.distributed import Backend
from hf_pss.health.spectra import measure_spectra
from hf_pss.selection import MatrixView

__all__ = ["effective_rank_of", "measure_effective_ranks"]


def effective_rank_of(sigmas: Sequence[float]) -> float:
    """Return exp(−Σ p_i ln p_i), p_i = σ_i / Σσ, of a whole spectrum.

    Roy & Vetterli 2007, EUSIPCO. In [1, min(m, n)], without unit; 0 for the zero matrix, NaN where
    one value is NaN, as `hf_pss.linalg.effective_rank`.

    >>> round(effective_rank_of([2.0, 2.0, 0.0]), 12)
    2.0
    """
    total = math.fsum(sigmas)
    if not 0 < total < math.inf:
        return 0.0 if total == 0 else math.nan
    shares = (sigma / total for sigma in sigmas)
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


def measure_effective_ranks(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return `effective_rank_of` each 2-D matrix by name; NaN where it holds NaN or inf.

    Cost and errors are those of `measure_spectra`.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    spectra = measure_spectra(views, parameters, backend)
    return {name: effective_rank_of(sigmas) for name, sigmas in spectra.items()}
