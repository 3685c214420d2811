"""Spectral density of a Hessian by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.health.curvature.lanczos import lanczos
from hf_pss.health.curvature.products import Hessian
from hf_pss.health.curvature.trace import rademacher

__all__ = ["SpectralDensity", "hessian_density"]

# [ours] A hundredth of the range: narrower and the nodes of one probe show as teeth.
_WIDTH_RATIO = 0.01


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """The eigenvalues' distribution as point masses: the mean over probes of Gauss quadratures."""

    nodes: Tensor
    """(N,), float64 on the host, ascending, in units of loss / parameter²; a NaN where a product
    was not finite."""
    weights: Tensor
    """(N,), float64, ≥ 0, of sum 1: the share of all directions that each node stands for."""
    num_products: int
    """Hessian–vector products spent."""

    def mean_of_power(self, power: int) -> float:
        """Return Σ w θ^p, an estimate of tr(H^p) / n."""
        return float((self.weights * self.nodes**power).sum())

    def share_below(self, level: float) -> float:
        """Return the mass below a level; at 0, the share of directions of negative curvature."""
        if not bool(self.nodes.isfinite().all()):
            return math.nan
        return float(self.weights[self.nodes < level].sum())

    def smoothed(self, grid: Tensor, *, width: float | None = None) -> Tensor:
        """Return Σ w N(x; θ, width²), which integrates to 1.

        Args:
            grid: (g,), where to evaluate, any real floating dtype.
            width: Standard deviation of the Gaussian, in the units of the nodes. None: a hundredth
                of their range. PyHessian's variance is proportional to the range, so its plots
                change shape with the loss's unit; this one does not.

        Returns:
            (g,), float64.
        """
        if width is None:
            extent = float(self.nodes[-1] - self.nodes[0])
            scale = max(abs(float(self.nodes[0])), abs(float(self.nodes[-1])), 1e-30)
            width = _WIDTH_RATIO * (extent if extent > 0 else scale)
        elif width <= 0:
            raise ConfigurationError(f"You gave width={width}; give a positive one, or None.")
        z = (grid.double().unsqueeze(-1) - self.nodes) / width
        bells = torch.exp(-0.5 * z.square()) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights


def hessian_density(
    hessian: Hessian, *, num_probes: int = 8, num_steps: int = 64, seed: int = 0
) -> SpectralDensity:
    """Estimate the density of H's eigenvalues (Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159).

    Per probe v: Lanczos from v gives T = SΘSᵀ; its Ritz values θ_j with weights s_{1j}² are the
    nodes and weights of the Gauss quadrature for v's spectral measure (Golub & Meurant 2010,
    section 3), exact for every vᵀH^p v / n with p ≤ 2·steps − 1. Probes are ±1, of length √n
    exactly, where the paper's are normal and normalised. Between probes the mean is unbiased; nodes
    far inside a continuous bulk are no eigenvalues.

    Cost: on demand. num_probes × num_steps Hessian–vector products; memory for num_steps vectors
    as long as all parameters together, in float32.

    Args:
        hessian: Of the loss.
        num_probes: More for less scatter.
        num_steps: More for finer resolution; never more than there are parameters.
        seed: Of the probes; the host's generator, so the same on every device.

    Raises:
        ConfigurationError: num_probes or num_steps below 1.

    >>> w = torch.nn.Parameter(torch.ones(4))
    >>> density = hessian_density(Hessian(lambda: (w**2).sum(), {"w": w}), num_probes=1)
    >>> density.nodes.tolist(), density.weights.tolist()
    ([2.0], [1.0])
    """
    if num_probes < 1 or num_steps < 1:
        raise ConfigurationError(
            f"You gave num_probes={num_probes}, num_steps={num_steps}; give 1 or more of each."
        )
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, num_products = [], [], 0
    for _ in range(num_probes):
        found = lanczos(hessian.product, rademacher(hessian, generator), num_steps)
        num_products += found.diagonal.numel()
        if math.isnan(found.remainder):
            nodes.append(torch.full((1,), math.nan, dtype=torch.float64))
            weights.append(torch.ones(1, dtype=torch.float64))
            break
        values, vectors = found.ritz()
        nodes.append(values)
        weights.append(vectors[0].square())
    order = torch.cat(nodes).sort()  # torch sorts NaN last
    return SpectralDensity(
        nodes=order.values,
        weights=torch.cat(weights)[order.indices] / len(nodes),
        num_products=num_products,
    )
