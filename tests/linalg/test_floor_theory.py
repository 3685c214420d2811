"""The statements of docs/theory.md, in numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_pss.linalg import StableRankCap, noise_stable_rank, smooth_spectrum, stable_rank

# SR of the capped matrix against F, fp64, all spectra here: 2e-15 measured.
REACHED = 1e-13
# Of the searched spectra none was nearer than a·C_c by more than rounding.
NEARER = 1e-10
SPECTRA = {
    "power": torch.arange(1, 13, dtype=torch.float64) ** -1.5,
    "one out": torch.tensor([9.0] + [1.0] * 11, dtype=torch.float64),
    "three out": torch.tensor([9.0, 7.0, 5.0] + [1.0] * 9, dtype=torch.float64),
}


def matrix(sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = len(sigma)
    u, v = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return u @ sigma.diag() @ v.T


def capped(weight: Tensor, floor: float) -> Tensor:
    return smooth_spectrum(weight, StableRankCap(torch.tensor(floor)), max_rank=99).weight


@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("floor", [2.5, 4.0, 6.0])
def test_the_cap_reaches_the_floor_and_no_more(sigma: Tensor, floor: float) -> None:
    weight = matrix(sigma)
    if stable_rank(weight) < floor:
        assert stable_rank(capped(weight, floor)).item() == pytest.approx(floor, rel=REACHED)


@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("floor", [2.5, 4.0, 6.0])
def test_the_nearest_matrix_with_that_stable_rank_is_the_cap_times_a_factor(
    sigma: Tensor, floor: float
) -> None:
    weight = matrix(sigma)
    cap = capped(weight, floor)
    factor = (weight * cap).sum() / cap.square().sum()
    if stable_rank(weight) >= floor:
        return
    assert factor >= 1
    ours = (weight - factor * cap).norm()
    # Spectra all around the optimum, made feasible by the cap's own rule, cannot be nearer.
    generator = torch.Generator().manual_seed(1)
    best = torch.linalg.svdvals(factor * cap)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(300):
            noise = torch.randn(len(sigma), generator=generator, dtype=torch.float64)
            other = (best * (1 + scale * noise)).abs().sort(descending=True).values
            feasible = torch.linalg.svdvals(capped(other.diag(), floor))
            along = (sigma * feasible).sum() / feasible.square().sum()
            assert (sigma - along * feasible).norm() >= ours - NEARER
    # And the plain cap is farther, where anything was capped: the statement is not empty.
    assert (weight - cap).norm() > ours


def test_noise_lies_at_its_unit_and_scatters_little() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = stable_rank(torch.randn(400, 64, 64, generator=generator))
    assert ranks.mean().item() == pytest.approx(1.06 * noise_stable_rank(64, 64), rel=0.02)
    assert ranks.std().item() / ranks.mean().item() == pytest.approx(0.047, abs=0.005)


def test_decay_alone_leaves_the_stable_rank() -> None:
    weight = matrix(SPECTRA["power"])
    assert stable_rank(0.9 * weight).item() == pytest.approx(stable_rank(weight).item())
