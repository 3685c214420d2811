"""Spectral norms by warm-started power iteration against a float64 decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2
from torch import Tensor, nn

from hf_pss.health.probe_meters import SpectralNormMeter, power_round
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices

BACKEND = Backend()
EXACT_TOLERANCE = 4e-7  # 1.4e-7
COSINE_TOLERANCE = 1.8e-7  # 6.1e-8
STALE_ABOVE = 0.05
# Noise of side 16 that moves by 1 % of its norm a call, one round each: no gap to converge by.
FOLLOWED_TOLERANCE = 0.1  # 0.044


def sigma64(weight: Tensor) -> float:
    return float(torch.linalg.svdvals(weight.detach().double())[0])


def model_of() -> tuple[tuple[MatrixView, ...], dict[str, nn.Parameter]]:
    torch.manual_seed(2)
    model = gpt2(num_layers=2)
    return select_matrices(model).matrices, named_parameters_canonical(model)


def read(view: MatrixView, parameters: dict[str, nn.Parameter]) -> Tensor:
    return view.read(parameters[view.parameter_name])


def test_the_first_call_is_exact() -> None:
    views, parameters = model_of()
    measured = SpectralNormMeter(views, BACKEND).measure(parameters)
    assert set(measured) == {view.name for view in views}
    for view in views:
        found = measured[view.name]
        assert found.sigma == pytest.approx(sigma64(read(view, parameters)), rel=EXACT_TOLERANCE)
        assert found.residual <= STALE_ABOVE


def test_it_follows_changing_weights_from_below() -> None:
    views, parameters = model_of()
    meter = SpectralNormMeter(views, BACKEND)
    meter.measure(parameters)
    torch.manual_seed(0)
    pushes = {name: torch.randn_like(p) for name, p in parameters.items()}
    for _ in range(30):
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(pushes[name], alpha=float(0.01 * p.norm() / pushes[name].norm()))
        measured = meter.measure(parameters)
        for view in views:
            exact = sigma64(read(view, parameters))
            assert measured[view.name].sigma <= exact * (1 + EXACT_TOLERANCE)
            assert measured[view.name].sigma == pytest.approx(exact, rel=FOLLOWED_TOLERANCE)


def test_a_stale_estimate_is_marked_and_recovers() -> None:
    views, parameters = model_of()
    meter = SpectralNormMeter(views, BACKEND)
    meter.measure(parameters)
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.manual_seed(0)
    with torch.no_grad():
        parameters[name].copy_(
            10 * torch.outer(torch.randn(16), torch.randn(64)) + parameters[name]
        )
    stale = meter.measure(parameters)[name]
    assert stale.residual > STALE_ABOVE
    meter.measure(parameters)
    fresh = meter.measure(parameters)[name]
    assert fresh.residual <= STALE_ABOVE
    assert fresh.sigma == pytest.approx(sigma64(parameters[name]), rel=EXACT_TOLERANCE)


def test_only_a_restart_finds_a_larger_value_that_is_orthogonal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The residual does not show it, as the docstring warns."""
    weight = torch.diag(torch.tensor([1.0, 5.0]))
    sigma, _, residual = power_round(weight, torch.tensor([1.0, 0.0]))
    assert (float(sigma), float(residual)) == (1.0, 0.0)
    views, parameters = model_of()
    monkeypatch.setattr("hf_pss.health.probe_meters._RESTART_EVERY", 2)
    meter = SpectralNormMeter(views, BACKEND)
    view = next(v for v in views if v.name == "transformer.h.0.mlp.c_fc.weight")
    for top in (0, 1):
        diagonal = torch.ones(16)
        diagonal[top] = 5.0
        with torch.no_grad():
            parameters[view.parameter_name].zero_()
            parameters[view.parameter_name][:16, :16] = torch.diag(diagonal)
        found = meter.measure(parameters)[view.name]
    assert found.sigma == pytest.approx(1.0, rel=EXACT_TOLERANCE)
    assert meter.measure(parameters)[view.name].sigma == pytest.approx(5.0, rel=EXACT_TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_breaks_and_heals_is_found_again(bad: float) -> None:
    views, parameters = model_of()
    meter = SpectralNormMeter(views, BACKEND)
    before = meter.measure(parameters)
    name = "transformer.h.1.mlp.c_proj.weight"
    healthy = parameters[name].detach().clone()
    with torch.no_grad():
        parameters[name][0, 0] = bad
    broken = meter.measure(parameters)
    assert math.isnan(broken[name].sigma)
    assert math.isnan(broken[name].residual)
    assert all(math.isfinite(n.sigma) for key, n in broken.items() if key != name)
    with torch.no_grad():
        parameters[name].copy_(healthy)
    after = meter.measure(parameters)[name]
    assert after.sigma == pytest.approx(before[name].sigma, rel=EXACT_TOLERANCE)


def test_zero_matrices_have_norm_zero_and_unit_vectors() -> None:
    weight = torch.zeros(2, 3, 4)
    weight[1, 0, 1] = 2.0
    v = torch.eye(4)[:2]
    sigma, moved, residual = power_round(weight, v)
    assert sigma.tolist() == [0.0, 0.0 + 2.0]
    assert torch.equal(moved, v)
    assert residual.tolist() == [0.0, 0.0]
    # Mapped to zero by a matrix that is not zero: nothing is known, and it says so.
    _, kept, lost = power_round(weight[1], torch.eye(4)[0])
    assert torch.equal(kept, torch.eye(4)[0])
    assert float(lost) == 1


def test_directions_are_the_right_singular_vectors() -> None:
    views, parameters = model_of()
    meter = SpectralNormMeter(views, BACKEND)
    assert meter.directions() == {}
    meter.measure(parameters)
    found = meter.directions()
    for view in views:
        v1 = torch.linalg.svd(read(view, parameters).double()).Vh[0]
        assert float((found[view.name].double() @ v1).abs()) == pytest.approx(
            1, abs=COSINE_TOLERANCE
        )


def test_no_matrix_gives_no_reading() -> None:
    assert SpectralNormMeter((), BACKEND).measure({}) == {}
