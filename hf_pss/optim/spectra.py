"""Spectra: reduce the few dominant directions of the momentum to the level of the other ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import Triplets, leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.linalg.triplets import DEFAULT_ROUNDS
from hf_pss.optim.rules import UPDATE_SCALES, Options, Rule, State


def _spectra(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    m, n = momenta.shape[-2:]
    scaled = unit_scaled(momenta)
    finite, momenta = scaled.finite[:, None, None], scaled.matrix
    start = state.get("right_vectors")
    triplets = leading_triplets(
        momenta,
        max(1, round(options["spike_fraction"] * min(m, n))),
        start=start,
        num_rounds=DEFAULT_ROUNDS if start is None else options["num_rounds"],
        check_finite=False,
    )
    direction = _levelled(momenta, triplets) * UPDATE_SCALES[options["scale"]](m, n)
    # An exact decomposition needs no starting vectors in the next step.
    kept = {} if triplets.is_exact else {"right_vectors": triplets.v}
    return torch.where(finite, direction, torch.nan), kept


def _levelled(momenta: Tensor, triplets: Triplets) -> Tensor:
    """Set spikes to 1 and the tail's root mean square to 1: UVᵀ + (M − UΣVᵀ)/σ_tail."""
    u, sigma, v = triplets.u, triplets.sigma, triplets.v
    m, n = momenta.shape[-2:]
    rounding = max(m, n) * torch.finfo(sigma.dtype).eps * sigma[:, :1]
    # Measure the rest, because for a nearly rank-deficient matrix ‖M‖² − Σσ² is only rounding.
    rest = momenta - (u * sigma.unsqueeze(-2)) @ v.mT
    norm = torch.linalg.matrix_norm(rest, keepdim=True)
    level = norm / max(1, min(m, n) - sigma.shape[-1]) ** 0.5
    has_tail = level > rounding.unsqueeze(-1)
    tail = torch.where(has_tail, rest / torch.where(has_tail, level, 1.0), 0.0)
    return (u * (sigma > rounding).unsqueeze(-2)) @ v.mT + tail


def _check(options: Options) -> None:
    fraction, rounds = options["spike_fraction"], options["num_rounds"]
    if not 0 < fraction <= 1 or not isinstance(rounds, int) or rounds < 0:
        raise ConfigurationError(
            f"You gave spike_fraction={fraction}, num_rounds={rounds}; the first must be above 0 "
            "and at most 1, and the second 0 or more."
        )


SPECTRA = Rule(
    defaults={"spike_fraction": 0.015, "num_rounds": 1},
    check=_check,
    direction=_spectra,
)
"""Huang et al. 2026, arXiv 2602.11185. With the k leading triplets, the momentum is
M = UΣVᵀ + tail. Then:

    S = σ_tail UVᵀ + tail,   σ_tail = ‖tail‖_F / √(min(m, n) − k),   D = s(m, n) · S / σ_tail,

where k = round(spike_fraction · min(m, n)), but at least 1. The triplets start from the
right vectors of the previous step and take ``num_rounds`` multiplications by MᵀM. Up to
min(m, n) = 192 they are exact.

**Ours**:

- The scale s. It fits because S/σ_tail has the Frobenius norm of an orthogonal matrix.
- The direction is UVᵀ alone if the tail is zero to rounding, or if the tail
  does not exist (vectors).
- The triplets come from a block Krylov space. The source makes one power iteration on k vectors.
"""
