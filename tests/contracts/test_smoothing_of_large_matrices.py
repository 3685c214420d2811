"""Where singular values are iterated, records say what a float64 SVD of the edited matrix says."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from hf_pss.linalg import Clip, SmoothingFunction, StableRankCap, noise_stable_rank, smooth_spectrum
from hf_pss.linalg.editing import Smoothed

# Relative errors; measured worst case beside each. Noise is the hardest spectrum for an iteration.
BEFORE = 1.5e-4  # 5.6e-5, noise at 768×768
RANK_BEFORE = 3e-4  # 1.0e-4
AFTER = {"noise": 0.03, "power": 0.012}  # 0.011, 0.0042
RANK_AFTER = {"noise": 0.06, "power": 0.025}  # 0.022, 0.0085
ABOVE_TARGET = {"noise": 0.1, "power": 4e-3}  # 0.041, 0.0016
RAISED = 1e-8  # 4.1e-9, relative to σ₁
FLOOR = 1.5e-5  # 5.7e-6

SIZES = [(128, 128), (256, 256), (1024, 256), (256, 1024), (768, 768)]
EXPONENTS = {"i^-0.15": 0.15, "i^-0.2": 0.2, "1/i": 1.0}


def noise(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@cache
def matrix(kind: str, m: int, n: int) -> Tensor:
    if kind == "noise":
        return noise(m, n)
    size = min(m, n)
    columns = 8 if kind == "collapsed" else size
    left = torch.linalg.qr(noise(m, columns, seed=m)).Q
    right = torch.linalg.qr(noise(n, columns, seed=n + 1)).Q
    if kind == "collapsed":
        strong = torch.linspace(4, 1.5, 8) * (m**0.5 + n**0.5)
        return noise(m, n) + (left * strong) @ right.mT
    return (left * torch.arange(1, size + 1) ** -EXPONENTS[kind]) @ right.mT


@cache
def exact_before(kind: str, m: int, n: int) -> Tensor:
    return torch.linalg.svdvals(matrix(kind, m, n).double())


def stable_rank(sigma: Tensor) -> float:
    return float((sigma / sigma[0]).square().sum())


def smooth(kind: str, m: int, n: int, phi: SmoothingFunction) -> tuple[Smoothed, Tensor]:
    smoothed = smooth_spectrum(matrix(kind, m, n), phi)
    return smoothed, torch.linalg.svdvals(smoothed.weight.double())


@pytest.mark.parametrize("kind", ["noise", *EXPONENTS])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_the_record_matches_the_weights(kind: str, m: int, n: int) -> None:
    before = exact_before(kind, m, n)
    smoothed, after = smooth(kind, m, n, Clip())
    band = "noise" if kind == "noise" else "power"
    assert smoothed.changed
    assert float(smoothed.sigma_before[0]) == pytest.approx(float(before[0]), rel=BEFORE)
    assert float(smoothed.stable_rank_before) == pytest.approx(stable_rank(before), rel=RANK_BEFORE)
    assert float(smoothed.spectral_norm_after) == pytest.approx(float(after[0]), rel=AFTER[band])
    rank = stable_rank(after)
    assert float(smoothed.stable_rank_after) == pytest.approx(rank, rel=RANK_AFTER[band])
    # Clip's own target, had all values been exact:
    assert after[0] <= before[int(smoothed.rank)] * (1 + ABOVE_TARGET[band])
    assert ((after - before) <= RAISED * before[0]).all()


@pytest.mark.parametrize("kind", ["collapsed", "i^-0.15", "1/i"])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (768, 768)])
def test_a_floor_is_reached(kind: str, m: int, n: int) -> None:
    before = stable_rank(exact_before(kind, m, n))
    floor = 0.5 * noise_stable_rank(m, n) if kind == "collapsed" else 1.3 * before
    smoothed, after = smooth(kind, m, n, StableRankCap(floor))
    assert before < 0.8 * floor
    assert stable_rank(after) == pytest.approx(floor, rel=FLOOR)
    assert float(smoothed.stable_rank_after) == pytest.approx(floor, rel=FLOOR)


def test_the_bands_can_be_left() -> None:
    """What the edit set σ₁ to is not what noise has afterwards: recording that would show."""
    smoothed, after = smooth("noise", 768, 768, Clip())
    assert float(smoothed.sigma_after[0]) != pytest.approx(float(after[0]), rel=AFTER["noise"])
