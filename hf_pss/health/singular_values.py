"""All singular values of every selected matrix.

Effective rank of every selected matrix: the exponential of its spectrum's entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import nn

from hf_pss.linalg.scaling import unit_scaled
from hf_pss.models.batching import assign_rounds, matrix_shapes, raise_together, read_round
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["effective_rank_of", "measure_effective_ranks", "measure_spectra"]


@torch.no_grad()
def measure_spectra(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, tuple[float, ...]]:
    """Return the singular values of each 2-D matrix by name, in descending order; NaN if broken.

    Cost: full, for sampled steps. Each matrix is decomposed by one rank, whose values go to all;
    one device-to-host read for the whole model.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.

    Raises:
        ElsewhereError: A decomposition has failed on another rank; there its error is raised.
    """
    lengths = {name: min(shape) for name, shape in matrix_shapes(views).items()}
    if not lengths:
        return {}
    device = next(iter(parameters.values())).device
    own = {name: torch.zeros(k, dtype=torch.float64, device=device) for name, k in lengths.items()}
    error: Exception | None = None
    for turn in assign_rounds(views, parameters, backend.world_size):
        stack = read_round(turn, parameters, backend)
        if stack is None or error is not None:
            continue
        try:
            scaled = unit_scaled(stack.matrices)
            values = scaled.restore(torch.linalg.svdvals(scaled.matrix))
        except Exception as caught:  # the others wait for this rank in the turns to come
            error = caught
            continue
        own |= dict(zip(stack.names, values.to(device, torch.float64), strict=True))
    flag = torch.tensor([float(error is not None)], dtype=torch.float64, device=device)
    has_failed, *told = backend.sum_to_host(torch.cat([flag, *own.values()]))
    if has_failed:
        raise_together(error)
    values_left = iter(told)
    return {name: tuple(islice(values_left, k)) for name, k in lengths.items()}


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
