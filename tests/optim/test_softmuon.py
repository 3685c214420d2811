from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from momenta import SHAPES, check_stack, check_zero, error, options_of, scale_of, series, spread
from optim.reference_twins.softmuon import quantile, soft_muon, soft_signum, temperatures
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.optim.muon import MUON
from hf_pss.optim.rules import Rule
from hf_pss.optim.softmuon import SOFTMUON, SOFTSIGNUM, folded_cauchy_quantile, softened

EQUAL = 3e-7  # 1.1e-7
ILL_CONDITIONED = 6e-8  # 2.7e-8
QUANTILE = 7e-13  # 2.4e-13

NUM_STEPS = 20
HARD_FRACTION = 0.5
PHASES = {"total_steps": NUM_STEPS, "hard_fraction": HARD_FRACTION}
TOLERANCE = 1e-4


def run(rule: Rule, momenta: list[Tensor]) -> list[Tensor]:
    state: dict[str, Tensor] = {}
    found = []
    for step, momentum in enumerate(momenta, start=1):
        directions, state = rule.direction(
            momentum[None], state, options_of(rule, step=step, **PHASES)
        )
        found.append(directions[0])
    return found


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_softmuon_as_its_reference(m: int, n: int) -> None:
    momenta = series(m, n, NUM_STEPS)
    found = run(SOFTMUON, momenta)
    hard = round(HARD_FRACTION * NUM_STEPS)
    for momentum, direction in zip(momenta[:hard], found, strict=False):
        muon, _ = MUON.direction(momentum[None], {}, options_of(MUON))
        assert torch.equal(direction, muon[0])
    sharp = 1 - TOLERANCE
    taus = temperatures(
        torch.linalg.svdvals(momenta[hard].double()),
        NUM_STEPS - hard,
        saturated=sharp / math.sqrt(1 - sharp**2),
    )
    for momentum, direction, tau in zip(momenta[hard:], found[hard:], taus, strict=True):
        expected = soft_muon(momentum.double(), tau, scale=scale_of(momentum))
        assert error(direction, expected) <= EQUAL


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_softsignum_as_its_reference(m: int, n: int) -> None:
    momenta = series(m, n, NUM_STEPS)
    found = run(SOFTSIGNUM, momenta)
    hard = round(HARD_FRACTION * NUM_STEPS)
    scale = scale_of(momenta[0]) / max(m, n) ** 0.5
    for momentum, direction in zip(momenta[:hard], found, strict=False):
        assert torch.equal(direction, scale * momentum.sign())
    taus = temperatures(
        momenta[hard].double().flatten(), NUM_STEPS - hard, saturated=math.atanh(1 - TOLERANCE)
    )
    for momentum, direction, tau in zip(momenta[hard:], found[hard:], taus, strict=True):
        assert error(direction, soft_signum(momentum.double(), tau, scale=scale)) <= EQUAL


@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e3, 1e9])
def test_an_ill_conditioned_matrix(tau: float) -> None:
    matrix = spread(48, 32, condition=1e5)
    found = softened(matrix[None], torch.tensor([tau], dtype=torch.float64))[0]
    expected = soft_muon(matrix.double(), tau)
    assert (found - expected).abs().max() <= ILL_CONDITIONED


@given(p=st.floats(0.01, 0.99), location=st.floats(-10, 10), width=st.floats(0.1, 10))
def test_the_quantile_is_the_one_that_newton_finds(p: float, location: float, width: float) -> None:
    found = folded_cauchy_quantile(p, *torch.tensor([location, width], dtype=torch.float64))
    expected = quantile(p, location, width)
    assert float(found) == pytest.approx(expected, rel=QUANTILE)


def test_tau_falls() -> None:
    """So directions shrink, from the polar factor on."""
    momentum = spread(24, 16)
    norms = [direction.norm() for direction in run(SOFTMUON, [momentum] * NUM_STEPS)]
    hard = round(HARD_FRACTION * NUM_STEPS)
    assert norms[hard] == pytest.approx(float(norms[0]), rel=EQUAL)
    assert all(a > b for a, b in zip(norms[hard:], norms[hard + 1 :], strict=False))


def test_the_fit_is_made_once() -> None:
    momenta = [spread(24, 16)] * (NUM_STEPS - 1)
    same, other = run(SOFTMUON, [*momenta, momenta[0]]), run(SOFTMUON, [*momenta, 2 * momenta[0]])
    # With τ fitted again, twice the matrix would give the same direction.
    assert other[-1].norm() > 1.0001 * same[-1].norm()


def test_training_beyond_total_steps_keeps_the_last_temperature() -> None:
    momenta = [spread(24, 16)] * (NUM_STEPS + 2)
    assert torch.equal(run(SOFTMUON, momenta)[-1], run(SOFTMUON, momenta)[NUM_STEPS - 1])


@pytest.mark.parametrize("rule", [SOFTMUON, SOFTSIGNUM])
@pytest.mark.parametrize("step", [1, NUM_STEPS])
def test_neighbours(rule: Rule, step: int) -> None:
    check_stack(rule, {}, step=step, **PHASES)
    check_zero(rule, step=step, **PHASES)


@pytest.mark.parametrize("rule", [SOFTMUON, SOFTSIGNUM])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"total_steps": 0},
        {"total_steps": 9, "hard_fraction": 1.1},
        {"total_steps": 9, "saturation_tolerance": 0.0},
    ],
)
def test_meaningless_options_are_refused(rule: Rule, options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        rule.check(options_of(rule, **options))


def test_the_check_can_fail() -> None:
    matrix = spread(24, 16)
    found = softened(matrix[None], torch.tensor([3.0], dtype=torch.float64))[0]
    assert error(found, soft_muon(matrix.double(), 3.0001)) > EQUAL
