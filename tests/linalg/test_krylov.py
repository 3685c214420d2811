from __future__ import annotations

import pytest
import torch
from spectra import check, noise
from spectra import with_spectrum as matrix_with
from torch import Tensor

from hf_pss.linalg.scaling import unit_scaled
from hf_pss.linalg.triplets import cold_start, krylov_space

# Relative to σ₁; measured worst case beside each.
ORTHONORMAL = 4e-6  # 1.4e-6
PRODUCT = 2e-6  # 6.8e-7


def space_of(weight: Tensor, num_rounds: int, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return krylov_space(weight, cold_start(weight, width), num_rounds)


def orthonormality_error(columns: Tensor) -> Tensor:
    gram = columns.mT @ columns
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().amax()


def hard_cases() -> dict[str, Tensor]:
    sigma = torch.ones(60)
    sigma[:3] = torch.tensor([1e5, 9.0, 7.0])
    cases = {
        "noise": noise(90, 60),
        "a batch": noise(2, 70, 50),
        "collapsed": matrix_with(sigma, 90, 60).float(),
        "two values": matrix_with((torch.arange(60) < 20) * 3.0 + 1, 90, 60).float(),
        "rank one": torch.ones(90, 60),
        "rank five": matrix_with(torch.linspace(3, 1, 5), 90, 60).float(),
        "zero": torch.zeros(90, 60),
        "identity": torch.eye(60),
    }
    return {name: unit_scaled(weight).matrix for name, weight in cases.items()}


@pytest.mark.parametrize("name", hard_cases())
def test_both_bases_are_orthonormal_and_nothing_of_the_product_is_left_out(name: str) -> None:
    weight = hard_cases()[name]
    u, core, v = space_of(weight, num_rounds=8)
    assert v.shape[-1] == u.shape[-1] == 36
    check(orthonormality_error(u), ORTHONORMAL)
    check(orthonormality_error(v), ORTHONORMAL)
    sigma1 = torch.linalg.matrix_norm(weight.double(), ord=2).clamp_min(1e-30)
    left_out = torch.linalg.matrix_norm(weight @ v - u @ core, ord=2)
    check(left_out / sigma1, PRODUCT)


def test_it_is_the_krylov_space() -> None:
    weight = noise(40, 30, dtype=torch.float64)
    start = cold_start(weight, 3)
    gram = weight.mT @ weight
    powers = torch.cat([start, gram @ start, gram @ gram @ start], dim=-1)
    _, _, v = krylov_space(weight, start, num_rounds=2)
    check((powers - v @ (v.mT @ powers)).norm() / powers.norm(), 1e-14)


def test_the_space_ends_at_the_whole_one() -> None:
    weight = noise(40, 30)
    _, core, v = space_of(weight, num_rounds=100, width=5)
    assert v.shape == (30, 30)
    exact = torch.linalg.svdvals(weight)
    check((torch.linalg.svdvals(core) - exact).abs() / exact[0], PRODUCT)


def test_the_check_can_fail() -> None:
    _, _, v = space_of(noise(90, 60), num_rounds=8)
    v[:, 20] += 1e-4 * v[:, 3]
    with pytest.raises(AssertionError, match="above the tolerance"):
        check(orthonormality_error(v), ORTHONORMAL)
