"""The smoothing functions φ, their table, and the stable-rank floors of matrices.

A smoothing function maps the leading singular values of a matrix. [ours] The paper (arXiv
2602.01308) names its functions but gives no formulas. Let σ_1 ≥ … ≥ σ_k be the k = ⌊SR⌋
dominant values, and s = σ_{k+1} the reference level. Every φ keeps the order of the
values and never raises σ_1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.norms import noise_stable_rank


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The input of a smoothing function, for each matrix of a batch."""

    sigma: Tensor
    """(..., K), float32 or float64: the leading singular values, descending."""
    rank: Tensor
    """(...) int64: k, the number of dominant values. k < K unless min(m, n) is 1."""
    tail: Tensor
    """(...): the Frobenius norm of the rest, ‖W‖_F² = Σσ² + tail². It is stored separately because
    the rounding of ‖W‖_F² would exceed the rest of a collapsed matrix."""
    shape: tuple[int, int]
    """(m, n)."""

    @property
    def frobenius(self) -> Tensor:
        """(...): ‖W‖_F."""
        return self.unit.squeeze(-1) * self.energy().sum(dim=-1).sqrt()

    @property
    def unit(self) -> Tensor:
        """(..., 1): σ₁, or 1 for the zero matrix. Divide by it before squaring."""
        return torch.where(self.sigma[..., :1] > 0, self.sigma[..., :1], 1.0)

    def energy(self) -> Tensor:
        """(..., K + 1): the squares of sigma and tail in units of σ₁²."""
        return (torch.cat([self.sigma, self.tail.unsqueeze(-1)], dim=-1) / self.unit).square()

    @property
    def reference(self) -> Tensor:
        """(..., 1): s = σ_{k+1}. It is zero if the matrix has fewer values."""
        return functional.pad(self.sigma, (0, 1)).gather(-1, self.rank.unsqueeze(-1))

    @property
    def rounding(self) -> Tensor:
        """(..., 1): σ₁·max(m, n)·ε. Smaller values count as zero, as in numpy's matrix_rank."""
        return self.sigma[..., :1] * (max(self.shape) * torch.finfo(self.sigma.dtype).eps)

    def index(self) -> Tensor:
        """(K,): 0, 1, …, K − 1."""
        return torch.arange(self.sigma.shape[-1], device=self.sigma.device)

    def move_dominant(self, values: Tensor) -> Tensor:
        """Replace the dominant values. Limit them to the range from s to σ because of rounding."""
        held = torch.maximum(torch.minimum(values, self.sigma), self.reference)
        return torch.where(self.index() < self.rank.unsqueeze(-1), held, self.sigma)


class SmoothingFunction(ABC):
    """A map φ on leading singular values, batched and pure. It does not use the matrix itself."""

    @property
    def whole_spectrum(self) -> bool:
        """Whether φ needs all min(m, n) values."""
        return False

    @abstractmethod
    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K), descending. You may assume that s is positive."""


class Clip(SmoothingFunction):
    """φ(σ) = s for the dominant values."""

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        return spectrum.move_dominant(spectrum.reference)


class Log(SmoothingFunction):
    """φ(σ) = s (1 + ln(σ/s)). φ(σ) ≈ σ near s, and s ≤ φ ≤ σ because ln x ≤ x − 1."""

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        s = spectrum.reference
        return spectrum.move_dominant(s * (1 + (spectrum.sigma / s).log()))


class Softplus(SmoothingFunction):
    """φ(σ) = c − T softplus((s − σ)/T) with c = s + T ln 2: a soft minimum of σ and a cap.

    T is s. The cap c is chosen so that φ(s) = s. It follows that s ≤ φ(σ) ≤ min(σ, c).
    """

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        s = spectrum.reference
        x = spectrum.sigma / s
        return spectrum.move_dominant(s * (1 + (math.log(2) - functional.softplus(1 - x))))


class Convolution(SmoothingFunction):
    """φ(σ)_i = mean of σ_{i−1}, σ_i, σ_{i+1} over the k dominant values and s, mirrored.

    φ keeps the sum of these k + 1 values, and all of them stay between s and σ₁. The mean includes
    s, which therefore rises. Without s, φ would be the identity for k = 1, which is the worst
    collapse.
    """

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        index, k = spectrum.index(), spectrum.rank.unsqueeze(-1)
        last = k.clamp(max=spectrum.sigma.shape[-1] - 1)  # a 1×n matrix has no reference value
        total, count = torch.zeros_like(spectrum.sigma), torch.zeros_like(k)
        for offset in (-1, 0, 1):
            mirrored = (index + offset) % (2 * last + 2)
            mirrored = torch.minimum(mirrored, 2 * last + 1 - mirrored)
            used = last >= abs(offset)
            total = total + torch.where(used, spectrum.sigma.gather(-1, mirrored), 0.0)
            count = count + used
        return torch.where(index <= last, total / count, spectrum.sigma)


class Softmax(SmoothingFunction):
    """φ(σ)_i = Σσ · softmax(σ/σ₁)_i over the k dominant values and s.

    φ keeps the sum of these k + 1 values. They include s for the reason given in `Convolution`.
    The ratios e^((σ_i−σ_j)/σ₁) are at most σ_i/σ_j, so all values stay between s and σ₁.
    """

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        sigma = spectrum.sigma
        window = spectrum.index() <= spectrum.rank.unsqueeze(-1)
        logits = sigma / sigma[..., :1]
        share = torch.where(window, logits, -math.inf).softmax(dim=-1)
        total = torch.where(window, sigma, 0.0).sum(dim=-1, keepdim=True)
        return torch.where(window, total * share, sigma)


class Hammer(SmoothingFunction):
    """φ(σ₁) = σ₂ and no other change. This is an edit of rank one."""

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        sigma = spectrum.sigma
        return (
            torch.cat([sigma[..., 1:2], sigma[..., 1:]], dim=-1) if sigma.shape[-1] > 1 else sigma
        )


@dataclass(frozen=True, slots=True, eq=False)
class StableRankCap(SmoothingFunction):
    """φ(σ) = min(σ, c) with the largest c for which ‖W*‖_F² / c² ≥ F: the stable-rank floor.

    With j values above c and R_j = ‖W‖_F² − Σ_{i≤j} σ_i², the condition (R_j + jc²)/c² = F
    gives c² = R_j / (F − j). j is the smallest count for which c = σ_{j+1} already
    satisfies the condition. If the computed values cannot reach the floor, all of them are
    capped at the last one.
    """

    floor: float | Tensor | None = None
    """F, or (...) with one floor for each matrix. None means the stable rank
    of noise of its shape."""

    def __post_init__(self) -> None:
        if isinstance(self.floor, float | int) and not self.floor >= 1:
            raise ConfigurationError(
                f"You gave floor={self.floor}; give a stable rank of at least 1."
            )

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        x = spectrum.sigma / spectrum.unit
        floor = self._floor(spectrum).expand(x.shape[:-1]).unsqueeze(-1)
        # rest[j] = R_j / σ₁², summed from the small end to avoid cancellation.
        rest = spectrum.energy().flip(-1).cumsum(-1).flip(-1)[..., :-1]
        j = spectrum.index()
        reached = rest + j * x.square() >= floor * x.square()
        first = reached.to(torch.int8).argmax(dim=-1, keepdim=True)
        level = (rest.gather(-1, first) / (floor - first).clamp_min(1e-6)).sqrt()
        level = torch.where(first == 0, x[..., :1], level)
        level = torch.where(reached.any(dim=-1, keepdim=True), level, x[..., -1:])
        return torch.minimum(spectrum.sigma, level * spectrum.unit)

    def _floor(self, spectrum: Spectrum) -> Tensor:
        floor = noise_stable_rank(*spectrum.shape) if self.floor is None else self.floor
        return torch.as_tensor(floor, dtype=spectrum.sigma.dtype, device=spectrum.sigma.device)


@dataclass(frozen=True, slots=True, eq=False)
class Anchored(SmoothingFunction):
    """φ with limits. No value moves past its level when the matrix was last healthy [ours].

    Let a_i be the recorded leading values and t the tolerance. Then σ* = min(max(φ(σ), lower),
    upper) with lower_i = min(σ_i, (1 + t) a_i) and upper_i = max(σ_i, a_i / (1 + t)). The record
    ends at K. For i > K the limits are lower_i = min(σ_i, (1 + t) a_K) and upper_i = σ_i. A matrix
    whose values are within t of its record is left alone. A matrix without a record (a_1 is zero or
    NaN) is also left alone.
    """

    phi: SmoothingFunction
    record: Tensor
    """(..., K): a, descending, in the units of the matrix."""
    tolerance: float = 0.05
    """t, the relative growth that is allowed."""

    @property
    def whole_spectrum(self) -> bool:
        """Whether φ needs all values."""
        return self.phi.whole_spectrum

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        sigma = spectrum.sigma
        record = self.record.to(sigma)
        num_recorded = min(record.shape[-1], sigma.shape[-1])
        record = record[..., :num_recorded]
        beyond = sigma.shape[-1] - num_recorded
        known = (record[..., :1] > 0) & record[..., :1].isfinite()
        last = record[..., -1:].expand(*record.shape[:-1], beyond)
        growth = 1 + self.tolerance
        lower = torch.minimum(sigma, growth * torch.cat([record, last], dim=-1))
        upper = torch.maximum(sigma, functional.pad(record / growth, (0, beyond)))
        moved = torch.minimum(torch.maximum(self.phi(spectrum), lower), upper)
        return torch.where(known, moved, sigma)


class PolarReset(SmoothingFunction):
    """φ(σ) = ‖W‖_F / √ρ for all ρ non-zero values: MSign's W ← ‖W‖_F UVᵀ / ‖UVᵀ‖_F.

    The source is arXiv 2602.01734. φ keeps ‖W‖_F, so values below the root mean square rise.
    """

    whole_spectrum = True

    def __call__(self, spectrum: Spectrum) -> Tensor:
        """Return the new values (..., K)."""
        kept = spectrum.sigma > spectrum.rounding
        level = spectrum.frobenius / kept.sum(dim=-1).clamp_min(1).sqrt()
        return torch.where(kept, level.unsqueeze(-1), 0.0)


SMOOTHING_FUNCTIONS: dict[str, Callable[[], SmoothingFunction]] = {
    "clip": Clip,
    "log": Log,
    "softplus": Softplus,
    "convolution": Convolution,
    "softmax": Softmax,
    "hammer": Hammer,
    "stable_rank_cap": StableRankCap,
    "polar": PolarReset,
}


Shapes = Mapping[str, tuple[int, int]]

# The median stable rank in units of noise was 1.03 to 1.09 for the fresh weights of seven
# architectures, and 0.34 for SmolLM2-135M (docs/experiments.md, 2026-11-30).
_TRAINED_BELOW = 0.8
# The share of its stable rank that a trained matrix must keep. A sound
# fine-tuning may lose the rest.
_TRAINED_SHARE = 0.5


def starting_ranks(shapes: Shapes, measured: Mapping[str, float]) -> dict[str, float]:
    """Return the stable rank that each floor refers to: the measured one, at most that of noise.

    >>> starting_ranks({"low": (64, 64), "zero": (64, 64)}, {"low": 9.0, "zero": 0.0})
    {'low': 9.0, 'zero': 16.0}

    Args:
        shapes: The shape (m, n) of each matrix, by name.
        measured: The stable ranks of the matrices when PSS began.
    """
    noise = _of_noise(shapes)
    # Zero (a zero-initialised projection) and NaN are not evidence of a healthy level.
    own = {name: rank for name, rank in measured.items() if 0 < rank < noise[name]}
    return {**noise, **own}


def looks_trained(shapes: Shapes, ranks: Mapping[str, float]) -> bool:
    """Return whether the median stable rank, far below that of noise, shows training [ours].

    >>> looks_trained({"a": (64, 64), "b": (64, 64)}, {"a": 4.0, "b": 9.0})
    True

    Args:
        shapes: The shape (m, n) of each matrix, by name.
        ranks: The stable ranks of the matrices. Zero, NaN and other names are ignored.
    """
    measured = {name: ranks.get(name, 0.0) / rank for name, rank in _of_noise(shapes).items()}
    shares = [share for share in measured.values() if 0 < share < math.inf]
    return bool(shares) and median(shares) < _TRAINED_BELOW


def floors_at(ratio: float, shapes: Shapes, starts: Mapping[str, float]) -> dict[str, float]:
    """Return the floor of each matrix: ρ times its starting stable rank.

    For weights that look trained the floor is ρ/2 times that rank. Their leading directions are
    learned, so the floor should only prevent a collapse. Without a starting rank, the stable rank
    of noise is used.

    >>> floors_at(0.5, {"fresh": (64, 64), "new": (64, 64)}, {"fresh": 15.0})
    {'fresh': 7.5, 'new': 8.0}
    >>> floors_at(1.0, {"trained": (64, 64)}, {"trained": 5.0})
    {'trained': 2.5}
    """
    if looks_trained(shapes, starts):
        ratio *= _TRAINED_SHARE
    return {name: ratio * rank for name, rank in {**_of_noise(shapes), **starts}.items()}


def _of_noise(shapes: Shapes) -> dict[str, float]:
    return {name: noise_stable_rank(m, n) for name, (m, n) in shapes.items()}
