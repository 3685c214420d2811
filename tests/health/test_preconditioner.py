"""Adam's denominators against torch's own step, and the bound against dense eigenvectors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama, token_rows
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from hf_pss.health.step_series import ALARM_RATIO, has_moved
from hf_pss.health.update_operator import (
    Denominators,
    denominators,
    measure_denominators,
    whole_model,
)
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices

BACKEND = Backend()
TOLERANCE = 4e-7  # 1.6e-7, relative
STEP_TOLERANCE = 2.5e-6  # 8.9e-7, relative: what a float32 weight shows of a step
BOUND_TOLERANCE = 3.5e-15  # 1.2e-15, relative
HALF_BIN = 1 + 1 / 32  # a quantile is told as the middle of its bin


def sqrt_condition(d: Tensor) -> float:
    smallest, largest = d.aminmax()
    return Denominators(float(smallest), float(largest), math.nan, math.nan).sqrt_condition


def trained(
    make: type, kind: type[Optimizer] = Adam, num_steps: int = 3, **options: object
) -> tuple[tuple[MatrixView, ...], dict[str, nn.Parameter], Optimizer]:
    torch.manual_seed(2)
    model = make()
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    rows = token_rows(4)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return select_matrices(model).matrices, named_parameters_canonical(model), optimizer


def exact_denominators(view: MatrixView, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    state = optimizer.state[parameter]
    group = optimizer.param_groups[0]
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
    corrected = v / (1 - group["betas"][1] ** float(state["step"]))
    return view.read(corrected.sqrt() + group["eps"])


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"eps": 1e-2}, {"betas": (0.9, 0.5)}, {"foreach": True}],
    ids=str,
)
def test_every_matrix_of_a_model_is_measured(make: type, options: dict[str, object]) -> None:
    views, parameters, optimizer = trained(make, AdamW, **options)
    measured = measure_denominators(views, parameters, optimizer, BACKEND, trim=0.05)
    assert list(measured) == [view.name for view in views]
    for view in views:
        d = exact_denominators(view, parameters[view.parameter_name], optimizer)
        found = measured[view.name]
        assert found.smallest == pytest.approx(float(d.min()), rel=TOLERANCE)
        assert found.largest == pytest.approx(float(d.max()), rel=TOLERANCE)
        assert found.sqrt_condition == pytest.approx(sqrt_condition(d), rel=TOLERANCE)
        for quantile, share in ((found.low, 0.05), (found.high, 0.95)):
            exact = float(d.flatten().sort().values[math.ceil(share * d.numel()) - 1])
            assert exact / HALF_BIN <= quantile <= exact * HALF_BIN
        assert 1 <= found.trimmed_sqrt_condition <= found.sqrt_condition


def test_they_are_what_adam_divides_by() -> None:
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = Adam([p], lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    torch.manual_seed(0)
    for _ in range(4):
        before, p.grad = p.detach().clone(), torch.randn(3, 4)
        optimizer.step()
    state = optimizer.state[p]
    found = denominators(state["exp_avg_sq"], eps=1e-3, bias_correction=1 - 0.9**4)
    assert p.grad is not None
    step = before - p.detach()
    assert torch.allclose(step, p.grad / found, rtol=STEP_TOLERANCE, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_condition_of_the_update_operators_eigenvectors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 24
    d = torch.rand(4, 6, generator=generator, dtype=torch.float64).mul(4).exp()
    h = torch.randn(n, n, generator=generator, dtype=torch.float64)
    h = h + h.mT
    m = 1 / d.flatten()
    inner, q = torch.linalg.eigh(m.sqrt()[:, None] * h * m.sqrt())
    v = m.sqrt()[:, None] * q
    update = torch.eye(n, dtype=torch.float64) - 0.1 * m[:, None] * h
    assert torch.allclose(update @ v, v * (1 - 0.1 * inner))
    assert float(torch.linalg.cond(v)) == pytest.approx(sqrt_condition(d), rel=BOUND_TOLERANCE)
    unit = v / torch.linalg.vector_norm(v, dim=0)
    assert float(torch.linalg.cond(unit)) <= math.sqrt(n) * sqrt_condition(d)


def test_a_multiple_of_the_identity_is_normal_and_one_dead_weight_is_trimmed() -> None:
    assert sqrt_condition(torch.full((3, 3), 0.3)) == 1
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = Adam([p], eps=1e-8)
    p.grad = torch.ones(64, 64)
    p.grad[0, 0] = 0
    optimizer.step()
    view = MatrixView("w", "w", "mlp", "h.0", (64, 64), False, None, "")
    found = measure_denominators((view,), {"w": p}, optimizer, BACKEND)["w"]
    assert found.sqrt_condition == pytest.approx(1e4, rel=1e-6)
    assert 1 <= found.trimmed_sqrt_condition <= HALF_BIN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_broken_moment_harms_no_other_matrix(bad: float) -> None:
    views, parameters, optimizer = trained(gpt2)
    before = measure_denominators(views, parameters, optimizer, BACKEND)
    name = "transformer.h.0.mlp.c_fc.weight"
    optimizer.state[parameters[name]]["exp_avg_sq"][0, 0] = bad
    after = measure_denominators(views, parameters, optimizer, BACKEND)
    broken = after.pop(name)
    assert math.isnan(broken.sqrt_condition)
    assert math.isnan(broken.trimmed_sqrt_condition)
    assert after == {name: before[name] for name in after}
    assert math.isnan(whole_model({**after, name: broken}).sqrt_condition)


def test_zeros_are_as_large_as_eps_and_without_eps_the_bound_is_infinite() -> None:
    views, parameters, optimizer = trained(gpt2)
    name = "transformer.h.0.mlp.c_fc.weight"
    optimizer.state[parameters[name]]["exp_avg_sq"].zero_()
    found = measure_denominators(views, parameters, optimizer, BACKEND)[name]
    assert found.sqrt_condition == found.trimmed_sqrt_condition == 1
    optimizer.param_groups[0]["eps"] = 0.0
    found = measure_denominators(views, parameters, optimizer, BACKEND)[name]
    assert found.sqrt_condition == math.inf


def test_moments_in_bfloat16_are_read_as_float32() -> None:
    v = torch.rand(4, 5).bfloat16()
    found = denominators(v, eps=1e-8, bias_correction=0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, denominators(v.float(), eps=1e-8, bias_correction=0.5))


def test_the_smallest_squares_of_float32_do_not_vanish() -> None:
    d = denominators(torch.tensor([[1e-44, 1e38]]), eps=0.0, bias_correction=1.0)
    assert sqrt_condition(d) == pytest.approx(math.sqrt(1e19 / 1e-22), rel=0.01)


def test_without_a_second_moment_there_is_nothing_to_measure() -> None:
    views, parameters, _ = trained(gpt2, num_steps=0)
    for kind in (torch.optim.SGD, Adam):
        optimizer = kind(parameters.values(), lr=0.1)
        assert measure_denominators(views, parameters, optimizer, BACKEND) == {}


def test_a_state_before_its_first_step_is_as_large_as_eps() -> None:
    views, parameters, optimizer = trained(gpt2)
    for state in optimizer.state.values():
        state["step"].zero_()
        state["exp_avg_sq"].zero_()
    measured = measure_denominators(views, parameters, optimizer, BACKEND)
    assert {one.largest for one in measured.values()} == {1e-8}


def test_matrices_that_are_not_trained_are_left_out() -> None:
    views, parameters, _ = trained(gpt2, num_steps=0)
    attention = [p for name, p in parameters.items() if ".attn." in name]
    optimizer = Adam(attention)
    for p in attention:
        p.grad = torch.ones_like(p)
    optimizer.step()
    measured = measure_denominators(views, parameters, optimizer, BACKEND)
    assert list(measured) == [view.name for view in views if view.role == "attention"]


def test_measuring_changes_no_state() -> None:
    views, parameters, optimizer = trained(gpt2)
    before = {p: s["exp_avg_sq"].clone() for p, s in optimizer.state.items()}
    measure_denominators(views, parameters, optimizer, BACKEND)
    assert all(torch.equal(s["exp_avg_sq"], before[p]) for p, s in optimizer.state.items())


def test_the_whole_model_has_the_range_of_all_matrices() -> None:
    views, parameters, optimizer = trained(llama)
    measured = measure_denominators(views, parameters, optimizer, BACKEND)
    found = whole_model(measured)
    assert found.sqrt_condition >= max(one.sqrt_condition for one in measured.values())
    assert math.isnan(whole_model({}).largest)
    assert whole_model({"a": Denominators(1.0, 2.0, 1.0, 2.0)}) == Denominators(1.0, 2.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("now", "expected"),
    [(1.0, False), (9.9, False), (ALARM_RATIO, True), (0.1, True), (math.inf, True)],
)
def test_an_order_of_magnitude_is_an_alarm(now: float, expected: bool) -> None:
    assert has_moved(1.0, now) is expected
    assert has_moved(1.0, math.nan)
    assert has_moved(math.nan, now)
