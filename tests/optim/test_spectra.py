from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from momenta import SHAPES, check_stack, check_zero, error, noise, options_of, scale_of, spread
from optim.reference_twins.spectra import spectra
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.optim.spectra import SPECTRA

EQUAL = 8e-6  # 2.8e-6
# ‖D − reference‖_F / ‖reference‖_F and σ₁ of D, after 10 warm-started steps.
WARM_DIRECTION = 0.025  # 0.0092
WARM_SIGMA1 = 1.0015  # 1.0006


def one(momentum: Tensor, state: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    return SPECTRA.direction(momentum[None], state or {}, options_of(SPECTRA, **options))[0][0]


def spiking(num_steps: int, *, width: int, num_spikes: int) -> list[Tensor]:
    """Momenta of noise, μ = 0.95, and spikes of 4 to 8 times its edge, that turn slowly."""
    u, v = noise(width, num_spikes, seed=1), noise(width, num_spikes, seed=2)
    edge = 2 * math.sqrt(width * 0.05 / 1.95)
    strength = 4 * edge * torch.linspace(1, 2, num_spikes)
    momentum, found = torch.zeros(width, width), []
    for step in range(num_steps):
        u = torch.linalg.qr(u + 0.05 * noise(width, num_spikes, seed=100 + step)).Q
        v = torch.linalg.qr(v).Q
        gradient = noise(width, width, seed=200 + step) + (u * strength) @ v.mT
        momentum = 0.95 * momentum + 0.05 * gradient
        found.append(momentum)
    return found


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (128, 96)])
@pytest.mark.parametrize("fraction", [0.015, 0.2])
def test_spectra_as_its_reference(m: int, n: int, fraction: float) -> None:
    momentum = spread(m, n)
    expected = spectra(momentum.double(), spike_fraction=fraction, scale=scale_of(momentum))
    assert error(one(momentum, spike_fraction=fraction), expected) <= EQUAL


def test_the_norm_is_that_of_an_orthogonal_update() -> None:
    momentum = noise(24, 40)
    norm = float(one(momentum).norm())
    assert norm == pytest.approx(scale_of(momentum) * math.sqrt(24), rel=EQUAL)


def test_without_a_tail_the_spikes_are_left() -> None:
    momentum = noise(24, 1, seed=1) @ noise(1, 16, seed=2)
    expected = momentum / momentum.norm() * scale_of(momentum)
    assert error(one(momentum), expected.double()) <= EQUAL


def test_warm_starts_follow_the_spikes() -> None:
    state: dict[str, Tensor] = {}
    momenta = spiking(20, width=256, num_spikes=4)
    for step, momentum in enumerate(momenta):
        directions, state = SPECTRA.direction(momentum[None], state, options_of(SPECTRA))
        assert state["right_vectors"].shape == (1, 256, 4)
        if step < 10:
            continue
        expected = spectra(momentum.double(), scale=scale_of(momentum))
        assert (directions[0] - expected).norm() <= WARM_DIRECTION * expected.norm()
        sigma1, true = (float(torch.linalg.svdvals(x)[0]) for x in (directions[0], expected))
        assert sigma1 <= WARM_SIGMA1 * true


def test_a_start_is_used() -> None:
    """With no rounds the spikes are those of the start: a wrong one leaves them standing."""
    momentum = spiking(5, width=256, num_spikes=4)[-1]
    _, state = SPECTRA.direction(momentum[None], {}, options_of(SPECTRA))
    wrong = {"right_vectors": noise(1, 256, 4)}
    good, bad = (
        torch.linalg.matrix_norm(one(momentum, s, num_rounds=0), ord=2) for s in (state, wrong)
    )
    assert bad > 1.5 * good


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_units_do_not_matter(unit: float) -> None:
    momentum = spread(24, 40)
    assert error(one(unit * momentum), one(momentum).double()) <= EQUAL


def test_small_matrices_need_no_state() -> None:
    assert not SPECTRA.direction(noise(1, 24, 40), {}, options_of(SPECTRA))[1]


def test_neighbours() -> None:
    check_stack(SPECTRA, {})
    check_zero(SPECTRA)


@pytest.mark.parametrize("options", [{"spike_fraction": 0.0}, {"num_rounds": -1}])
def test_meaningless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        SPECTRA.check(options_of(SPECTRA, **options))


def test_the_check_can_fail() -> None:
    momentum = spread(24, 16)
    wrong = spectra(momentum.double(), spike_fraction=0.2, scale=scale_of(momentum))
    assert error(one(momentum), wrong) > EQUAL
