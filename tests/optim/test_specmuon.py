from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from momenta import SHAPES, check_stack, check_zero, error, options_of, scale_of, series, spread
from optim.reference_twins.specmuon import Mode, relaxed, specmuon
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.optim.muon import MUON
from hf_pss.optim.specmuon import SPECMUON

EQUAL = 8e-6  # 3.4e-6
RELAXED = 2e-13  # 7.2e-14
# ‖D − Muon‖ / ‖Muon‖ after 25 steps at one loss: what dissipates without a rise.
STEADY = 5e-3  # 1.8e-3
NUM_STEPS = 20
LR = 0.02


def direction_of(
    momentum: Tensor, state: dict[str, Tensor], loss: float | Tensor | None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    return SPECMUON.direction(
        momentum[None], state, options_of(SPECMUON, loss=loss, lr=LR, **options)
    )


def restless(step: int) -> float:
    """Falls, and rises now and then."""
    return 3 - 0.1 * step + 0.5 * math.sin(3 * step)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("lr", [0.02, 1.0])
def test_specmuon_as_its_reference(m: int, n: int, lr: float) -> None:
    state: dict[str, Tensor] = {}
    modes: list[Mode] = []
    for step, momentum in enumerate(series(m, n, NUM_STEPS)):
        loss = restless(step)
        options = options_of(SPECMUON, loss=torch.tensor(loss), lr=lr)
        directions, state = SPECMUON.direction(momentum[None], state, options)
        expected, modes = specmuon(
            momentum.double(), modes, loss=loss, lr=lr, scale=scale_of(momentum)
        )
        assert error(directions[0], expected) <= EQUAL
    assert max(mode.scalar for mode in modes) < 0.98 * math.sqrt(restless(0))


@given(
    scalar=st.floats(0.1, 3),
    dissipation=st.floats(0, 0.1),
    energy=st.floats(0.1, 3),
    share=st.floats(0, 1),
)
def test_the_relaxation_is_the_quadratic_s(
    scalar: float, dissipation: float, energy: float, share: float
) -> None:
    found = min(energy, math.sqrt(scalar**2 + share * dissipation))
    assert relaxed(Mode(scalar, dissipation), energy, share) == pytest.approx(found, rel=RELAXED)


def test_energies_never_rise() -> None:
    """The law of energy dissipation, whatever the loss does: r̃² <= r² of the step before."""
    state: dict[str, Tensor] = {}
    before = torch.tensor(torch.inf)
    for step, momentum in enumerate(series(24, 16, NUM_STEPS)):
        _, state = direction_of(momentum, state, restless(step))
        assert (state["energy"] < before).all()
        before = (state["energy"].square() + state["dissipation"]).sqrt()


def test_a_steady_loss_leaves_muon_nearly_alone() -> None:
    muon, _ = MUON.direction(spread(24, 16)[None], {}, options_of(MUON))
    state: dict[str, Tensor] = {}
    for _ in range(25):
        directions, state = direction_of(spread(24, 16), state, 3.0)
    assert 0 < (directions - muon).norm() / muon.norm() <= STEADY


def test_a_rise_of_the_loss_damps_the_leading_modes() -> None:
    momentum = spread(24, 16)
    _, state = direction_of(momentum, {}, 1.0)
    directions, _ = direction_of(momentum, state, 4.0, num_modes=8)
    u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
    values = (u.mT @ directions[0] @ vh.mT).diagonal() / scale_of(momentum)
    # √(1/4), less what the two steps dissipate.
    assert values[:8].tolist() == pytest.approx([0.5] * 8, abs=STEADY)
    assert values[8:].tolist() == pytest.approx([1.0] * 8, abs=EQUAL)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_units_do_not_matter(unit: float) -> None:
    momentum = spread(24, 40)
    found, _ = direction_of(unit * momentum, {}, 0.1)
    assert error(found[0], direction_of(momentum, {}, 0.1)[0][0].double()) <= EQUAL


def test_no_loss_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="closure"):
        direction_of(spread(24, 16), {}, None)


def test_a_loss_that_is_not_finite_leaves_no_trace() -> None:
    momentum = spread(24, 16)
    _, state = direction_of(momentum, {}, 1.0)
    directions, after = direction_of(momentum, state, torch.nan)
    assert directions.isnan().all()
    assert all(torch.equal(after[name], state[name]) for name in state)
    _, first = direction_of(momentum, {}, torch.inf)
    again, _ = direction_of(momentum, first, 1.0)
    assert torch.equal(again, direction_of(momentum, {}, 1.0)[0])


def test_neighbours() -> None:
    check_stack(SPECMUON, {}, loss=2.0)
    stack = torch.stack([spread(12, 8, seed=seed) for seed in range(3)])
    _, state = SPECMUON.direction(stack, {}, options_of(SPECMUON, loss=2.0))
    check_stack(SPECMUON, state, loss=3.0)
    check_zero(SPECMUON, loss=2.0)


@pytest.mark.parametrize("options", [{"num_modes": 0}, {"relaxation": 1.5}, {"dtype": "half"}])
def test_meaningless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        SPECMUON.check(options_of(SPECMUON, **options))


def test_the_check_can_fail() -> None:
    momentum = spread(24, 16)
    directions, _ = direction_of(momentum, {}, 2.0)
    wrong, _ = specmuon(momentum.double(), [], loss=2.0, lr=2 * LR, scale=scale_of(momentum))
    assert error(directions[0], wrong) > EQUAL
