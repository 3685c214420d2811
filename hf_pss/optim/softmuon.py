"""SoftMuon and SoftSignum: a hard phase, then a sign function that softens with every step.

Feoktistov et al. 2026, arXiv 2605.31371, and github.com/brain-lab-research/softsign.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.optim.muon import MUON, check_polar, polar_direction
from hf_pss.optim.rules import UPDATE_SCALES, Options, Rule, State

# The source's bounds on τ.
_MIN_TAU, _MAX_TAU = 1.0, 1e9

_PHASES = {"total_steps": None, "hard_fraction": 0.9, "saturation_tolerance": 1e-4}


def softened(matrices: Tensor, tau: Tensor) -> Tensor:
    """Return τM(I + τ²MᵀM)^(-1/2): singular values σ → τσ / √(1 + (τσ)²).

    The computation uses the eigenvalues of the smaller Gram matrix in float64. The Gram matrix
    squares the condition number, so at a condition number of 1e5 one can only expect a precision of
    1e-6. The measured error was smaller: up to that condition number no entry differed from the
    result of an SVD by more than 2.7e-8.

    The upper block of the polar factor of [M; I/τ] is the same matrix. It needs no decomposition
    and may be faster on GPUs without fast float64. But at the same condition number the error was
    0.07 after 12 polynomial steps and 2e-4 after 16. The 16 steps took 0.84 s for a 768×768 matrix
    on one CPU core, and the eigenvalues took 0.16 s.

    Args:
        matrices: (b, m, n), float32, finite.
        tau: (b,), float64.
    """
    wide = matrices.shape[-2] < matrices.shape[-1]
    tall = (matrices.mT if wide else matrices).double()
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    shrink = (values.clamp_min(0) + tau.pow(-2).unsqueeze(-1)).rsqrt()
    soft: Tensor = (tall @ (vectors * shrink.unsqueeze(-2))) @ vectors.mT
    return (soft.mT if wide else soft).to(matrices.dtype)


def folded_cauchy_quantile(fraction: float, location: Tensor, width: Tensor) -> Tensor:
    """Return q with P(|X| <= q) = fraction, where X has a Cauchy distribution.

    The source uses Newton's method. We use a closed form, which follows from the formula for
    tan(a + b): q = (s² + μ²) sin πp / (s cos πp + √(s² + μ² sin² πp)).

    Args:
        fraction: p in [0, 1).
        location: μ, any shape.
        width: s >= 0, same shape as μ.

    >>> folded_cauchy_quantile(0.5, torch.tensor(0.0), torch.tensor(2.0)).item()
    2.0
    """
    sine, cosine = math.sin(math.pi * fraction), math.cos(math.pi * fraction)
    above = (width.square() + location.square()) * sine
    below = width * cosine + (width.square() + location.square() * sine**2).sqrt()
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


def _soft_muon(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    scale = UPDATE_SCALES[options["scale"]](*momenta.shape[-2:])
    fraction = _soft_fraction(options)
    if fraction is None:
        return polar_direction(momenta, options) * scale, _not_fitted(momenta)
    finite, clean = _finite(momenta)
    state = _fitted(state, clean, torch.linalg.svdvals)
    soft = 1 - options["saturation_tolerance"]
    tau = _temperature(soft / math.sqrt(1 - soft**2), fraction, state)
    return torch.where(finite, softened(clean, tau) * scale, torch.nan), state


def _soft_signum(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    m, n = momenta.shape[-2:]
    scale = UPDATE_SCALES[options["scale"]](m, n) / max(m, n) ** 0.5
    fraction = _soft_fraction(options)
    finite, clean = _finite(momenta)
    if fraction is None:
        return torch.where(finite, clean.sign() * scale, torch.nan), _not_fitted(momenta)
    state = _fitted(state, clean, _entries)
    tau = _temperature(math.atanh(1 - options["saturation_tolerance"]), fraction, state)
    soft = (clean * tau[:, None, None]).tanh().to(momenta.dtype)
    return torch.where(finite, soft * scale, torch.nan), state


def _soft_fraction(options: Options) -> float | None:
    """Return the progress of the soft phase, in [0, 1), or None before it begins."""
    total: int = options["total_steps"]
    step: int = options["step"]
    hard = round(float(options["hard_fraction"]) * total)
    if step <= hard or hard >= total:
        return None
    return (min(step, total) - hard - 1) / (total - hard)


def _finite(momenta: Tensor) -> tuple[Tensor, Tensor]:
    finite = momenta.isfinite().all(dim=(-2, -1))[:, None, None]
    return finite, torch.where(finite, momenta, 0.0)


def _not_fitted(momenta: Tensor) -> State:
    """Return the state before the fit. It has its final shape, so it can be saved and loaded.

    A negative width marks a missing fit.
    """
    zeros = momenta.new_zeros(len(momenta))
    return {"cauchy_location": zeros, "cauchy_width": zeros - 1}


def _entries(matrices: Tensor) -> Tensor:
    return matrices.flatten(1)


def _fitted(state: State, matrices: Tensor, values_of: Callable[[Tensor], Tensor]) -> State:
    """Fit a Cauchy distribution to the values of each matrix that has no fit yet.

    The location is the median, (b,), and the width is the median deviation, (b,).
    """
    state = state or _not_fitted(matrices)
    is_missing = state["cauchy_width"] < 0
    # This device-to-host read happens only in the soft phase. Its decomposition needs one anyway.
    if not is_missing.any():
        return state
    values = values_of(matrices)
    location = values.median(dim=-1).values
    width = (values - location.unsqueeze(-1)).abs().median(dim=-1).values
    fit = {"cauchy_location": location, "cauchy_width": width}
    return {name: torch.where(is_missing, value, state[name]) for name, value in fit.items()}


def _temperature(saturated: float, fraction: float, state: State) -> Tensor:
    location, width = state["cauchy_location"].double(), state["cauchy_width"].double()
    quantile = folded_cauchy_quantile(fraction, location, width)
    return (saturated / quantile).clamp(_MIN_TAU, _MAX_TAU)


def _check(options: Options) -> None:
    total, hard = options["total_steps"], options["hard_fraction"]
    tolerance = options["saturation_tolerance"]
    if total is None or total < 1:
        raise ConfigurationError(
            f"You gave total_steps={total}; give the number of optimizer steps of the whole run. "
            "The soft phase begins at a fraction of it."
        )
    if not 0 <= hard <= 1 or not 0 < tolerance < 1:
        raise ConfigurationError(
            f"You gave hard_fraction={hard}, saturation_tolerance={tolerance}; the first must be "
            "in [0, 1], and the second strictly between 0 and 1."
        )


def _check_muon(options: Options) -> None:
    check_polar(options)
    _check(options)


SOFTMUON = Rule(
    defaults={**MUON.defaults, **_PHASES},
    check=_check_muon,
    direction=_soft_muon,
)
"""Muon until step round(hard_fraction · total_steps), then s(m, n) · M(MᵀM + τ⁻²I)^(-1/2).

Here τ = clamp(φ⁻¹(1 − ε) / q(p), 1, 1e9) and φ(x) = x/√(1 + x²). The share p = j/T with j = 0, 1, …
rises over the T steps of the soft phase. q is the quantile of a folded Cauchy distribution, which
is fitted once, at the first of these steps. ``total_steps`` is the number of steps of the whole
run, and ``saturation_tolerance`` is ε. The other options are those of Muon.

**Ours**:

- Each matrix has a separate fit, on the singular values of its momentum. The source's code makes
  one fit on the gradients of all matrices of a group.
- A matrix that gets its first gradient during the soft phase is fitted at that step.
- After the last step τ stays constant.
"""

SOFTSIGNUM = Rule(defaults=_PHASES, check=_check, direction=_soft_signum)
"""The elementwise version: sign(M), then tanh(τM), τ = clamp(artanh(1 − ε) / q(p), 1, 1e9).

**Ours**:

- Each matrix has a separate fit, on the entries of its momentum.
- The direction is multiplied by s(m, n)/√max(m, n). This gives the hard phase the Frobenius norm
  that Muon has with the same scale. With ``max_dim`` the factor is 1, as in the source.
"""
