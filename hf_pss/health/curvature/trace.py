"""Trace of a Hessian, in total and of each parameter, by Hutchinson's estimator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.health.curvature.products import Hessian

__all__ = ["HessianTrace", "TraceEstimate", "hessian_trace", "rademacher"]


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """A mean over probes; unbiased, in units of loss / parameter²."""

    mean: float
    """NaN where a product was not finite."""
    standard_error: float
    """Sample standard deviation / √probes; NaN for one probe, which cannot know it."""


@dataclass(frozen=True, slots=True)
class HessianTrace:
    """tr H, and the trace of every parameter's own block on its diagonal; the parts add up."""

    total: TraceEstimate
    by_parameter: dict[str, TraceEstimate]
    num_products: int
    """Hessian–vector products spent: one a probe."""


def hessian_trace(hessian: Hessian, *, num_probes: int = 32, seed: int = 0) -> HessianTrace:
    """Estimate tr H = E[vᵀHv] with v_i = ±1 (Hutchinson 1989; PyHessian, arXiv 1912.07145).

    One probe serves all parameters: tr H_pp = E[v_pᵀ(Hv)_p], for v_p and the rest of v are
    independent. Its variance is Σ_{i≠j∈p} 2 H_ij² + Σ_{i∈p, j∉p} H_ij²; probing each parameter
    alone would save the second sum and cost a product a parameter. A diagonal H has no error.

    Cost: on demand. One Hessian–vector product a probe and one device-to-host read at the end.

    Args:
        hessian: Of the loss.
        num_probes: The standard error falls with its root.
        seed: Of the probes; the host's generator, so the same on every device.

    Raises:
        ConfigurationError: num_probes below 1.

    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> hessian_trace(Hessian(lambda: (w**2).sum(), {"w": w})).total.mean
    6.0
    """
    if num_probes < 1:
        raise ConfigurationError(f"You gave num_probes={num_probes}; give 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_probes):
        v = rademacher(hessian, generator)
        parts = hessian.split(v * hessian.product(v))
        rows.append(torch.stack([part.sum() for part in parts.values()]))
    samples = torch.stack(rows).cpu().double()  # the only read
    return HessianTrace(
        total=_estimate(samples.sum(dim=1)),
        by_parameter={name: _estimate(samples[:, i]) for i, name in enumerate(hessian.names)},
        num_products=num_probes,
    )


def rademacher(hessian: Hessian, generator: torch.Generator) -> Tensor:
    """Return a probe (n,) of independent ±1, drawn on the host."""
    signs = torch.randint(0, 2, (hessian.size,), generator=generator, dtype=torch.int8)
    return signs.to(hessian.device).to(hessian.dtype) * 2 - 1


def _estimate(samples: Tensor) -> TraceEstimate:
    num = samples.numel()
    error = float(samples.std()) / num**0.5 if num > 1 else float("nan")
    return TraceEstimate(mean=float(samples.mean()), standard_error=error)
