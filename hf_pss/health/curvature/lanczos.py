"""Extreme eigenvalues of a Hessian by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.health.curvature.products import Hessian

__all__ = ["ExtremeEigenvalues", "Tridiagonal", "hessian_eigenvalues", "lanczos"]

# In ε of the largest Ritz value, times √n: a remainder below it is rounding, not a direction.
_ROUNDING = 10
_BLOCK_SIZE = 8


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """T = QᵀHQ on the Krylov space of a start vector, and what is left outside: HQ = QT + r eᵀ."""

    diagonal: Tensor
    """(k,), float64 on the host."""
    off_diagonal: Tensor
    """(k − 1,), float64 on the host; 0 where a new start vector took over."""
    remainder: float
    """‖r‖; 0 where the space is invariant, NaN where a product was not finite."""

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values (k,), ascending, and T's eigenvectors (k, k) in columns."""
        matrix = torch.diag(self.diagonal)
        matrix += torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


@dataclass(frozen=True, slots=True)
class ExtremeEigenvalues:
    """Both ends of a Hessian's spectrum, in units of loss / parameter²."""

    largest: tuple[float, ...]
    """λ₁ ≥ λ₂ ≥ …; estimates from below. NaN where a product was not finite."""
    smallest: tuple[float, ...]
    """λ_n ≤ λ_{n−1} ≤ …, the most negative first; estimates from above."""
    largest_residuals: tuple[float, ...]
    """‖Hy − θy‖ of each: some eigenvalue lies that near. Only rounding comes on top."""
    smallest_residuals: tuple[float, ...]
    """The same of `smallest`."""
    by_magnitude: tuple[float, ...]
    """Those of both ends with the largest |λ|, signed: what power iteration finds, and so what
    PyHessian's ``eigenvalues`` returns. Its first is negative where |λ_n| > λ₁."""
    num_products: int
    """Hessian–vector products spent."""


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    num_steps: int,
    *,
    generator: torch.Generator | None = None,
    is_done: Callable[[Tridiagonal], bool] | None = None,
) -> Tridiagonal:
    """Tridiagonalise a symmetric map on a Krylov space (Golub & Van Loan, section 10.1).

    Each new vector is made orthogonal to all before it, twice, so that no eigenvalue comes back as
    a ghost. It keeps one vector of n entries a step, and reads two numbers a step from the device.

    Args:
        product: v ↦ Hv, (n,) to (n,), of a symmetric H.
        start: (n,), float32 or float64, not zero.
        num_steps: At most; never more than n.
        generator: On the host. Where the space turns out to be invariant, a new start vector is
            drawn from it, which finds eigenvalues again that are multiple. None: stop there.
        is_done: Asked after every step whether this will do.

    Returns:
        T; cut short, its remainder NaN, at the first product that is not finite.
    """
    n = start.numel()
    num_steps = min(num_steps, n)
    basis = _Basis(start)
    v = basis.add(start)
    alphas: list[float] = []
    betas: list[float] = []
    rounding = _ROUNDING * math.sqrt(n) * torch.finfo(start.dtype).eps
    largest = 0.0
    while True:
        image = product(v)
        alpha = torch.dot(image, v)
        rest = basis.project_out(image)
        host = torch.stack([alpha, torch.linalg.vector_norm(rest)]).tolist()  # the only read
        alphas.append(host[0])
        beta = host[1]
        largest = max(largest, abs(host[0]), beta)
        found = Tridiagonal(
            torch.tensor(alphas, dtype=torch.float64),
            torch.tensor(betas, dtype=torch.float64),
            beta,
        )
        if not math.isfinite(host[0] + beta):
            return Tridiagonal(found.diagonal, found.off_diagonal, math.nan)
        if beta <= rounding * largest:
            found = Tridiagonal(found.diagonal, found.off_diagonal, 0.0)
            if generator is None or len(alphas) == num_steps:
                return found
            rest = basis.project_out(torch.randn(n, generator=generator).to(start))
            beta = 0.0
        elif len(alphas) == num_steps or (is_done is not None and is_done(found)):
            return found
        betas.append(beta)
        v = basis.add(rest)


def hessian_eigenvalues(
    hessian: Hessian,
    *,
    num_eigenvalues: int = 1,
    num_steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> ExtremeEigenvalues:
    """Return the algebraically largest and smallest eigenvalues.

    Lanczos finds both ends of the spectrum in the same space, and clustered ones sooner than power
    iteration with deflation. It stops when every residual is at most tolerance · max |θ|. From one
    start vector an eigenvalue of exact multiplicity shows once, unless so few are distinct that the
    space is exhausted before.

    Cost: on demand. One Hessian–vector product a step, and memory for one more vector as long as
    all parameters together, in float32: 0.5 GB a step for 124M. Three eigenvalues at either end of
    a fresh GPT-2 of 3.3M parameters took 48 steps.

    Args:
        hessian: Of the loss.
        num_eigenvalues: How many at each end; fewer where there are fewer.
        num_steps: The most products to spend. Reached first, the residuals say how far it came.
        tolerance: Relative to the largest magnitude.
        seed: Of the start vector; the host's generator, so the same on every device.

    Raises:
        ConfigurationError: num_eigenvalues or num_steps below 1, or fewer steps than eigenvalues.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> found = hessian_eigenvalues(Hessian(lambda: w[0] ** 2 - 3 * w[1] ** 2, {"w": w}))
    >>> round(found.largest[0], 4), round(found.smallest[0], 4)
    (2.0, -6.0)
    """
    if not 1 <= num_eigenvalues <= num_steps:
        raise ConfigurationError(
            f"You gave num_eigenvalues={num_eigenvalues}, num_steps={num_steps}; give 1 or more "
            "eigenvalues, and at least as many steps."
        )
    wanted = min(num_eigenvalues, hessian.size)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(hessian.size, generator=generator).to(hessian.device, hessian.dtype)

    def is_done(found: Tridiagonal) -> bool:
        if found.diagonal.numel() < 2 * wanted:
            return False
        values, residuals = _ritz_residuals(found)
        ends = torch.cat([residuals[:wanted], residuals[-wanted:]])
        return bool((ends <= tolerance * values.abs().max()).all())

    found = lanczos(hessian.product, start, num_steps, generator=generator, is_done=is_done)
    num_products = found.diagonal.numel()
    if math.isnan(found.remainder):
        broken = (math.nan,) * wanted
        return ExtremeEigenvalues(broken, broken, broken, broken, broken, num_products)
    values, residuals = _ritz_residuals(found)
    ends = values if values.numel() < 2 * wanted else torch.cat([values[:wanted], values[-wanted:]])
    return ExtremeEigenvalues(
        largest=tuple(values.flip(0)[:wanted].tolist()),
        smallest=tuple(values[:wanted].tolist()),
        largest_residuals=tuple(residuals.flip(0)[:wanted].tolist()),
        smallest_residuals=tuple(residuals[:wanted].tolist()),
        by_magnitude=tuple(sorted(ends.tolist(), key=abs, reverse=True)[:wanted]),
        num_products=num_products,
    )


def _ritz_residuals(found: Tridiagonal) -> tuple[Tensor, Tensor]:
    """‖Hy − θy‖ = ‖r‖ |s_k| for the Ritz vector y = Qs (Parlett, section 13.2)."""
    values, vectors = found.ritz()
    return values, found.remainder * vectors[-1].abs()


class _Basis:
    """Orthonormal vectors in blocks that are allocated as they fill: most runs stop early."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._blocks: list[Tensor] = []
        self._num_vectors = 0

    def add(self, vector: Tensor) -> Tensor:
        """Normalise a vector that is orthogonal to all before, keep it and return it."""
        place = self._num_vectors % _BLOCK_SIZE
        if place == 0:
            self._blocks.append(self._like.new_zeros(_BLOCK_SIZE, self._like.numel()))
        kept = self._blocks[-1][place]
        kept.copy_(vector / torch.linalg.vector_norm(vector))
        self._num_vectors += 1
        return kept

    def project_out(self, vector: Tensor) -> Tensor:
        """Return what of a vector is orthogonal to all that are kept."""
        for _ in range(2):  # twice is enough (Parlett, section 6.9)
            for block in self._blocks:
                vector = vector - block.mT @ (block @ vector)
        return vector
