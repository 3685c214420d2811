"""Stable Jacobian energy against the formula on a float64 singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_pss.health.probe_meters import jacobian_energy, measure_jacobian_energies
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
# Shares in [0, 1], so absolute; the same band where triplets are iterated (side above 128).
TOLERANCE = 8e-7  # 2.7e-7


def oracle(weight: Tensor, grad: Tensor, max_rank: int = 32) -> float:
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = min(int(float(sigma.square().sum() / sigma[0] ** 2) + 1e-5), max_rank)
    g = grad.double()
    found = sum(float(u[:, i] @ g @ vh[i]) ** 2 for i in range(k))
    return found / float(g.square().sum())


def collapsed(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return a matrix with σ_i ∝ 1/i, and a gradient that leans on its first directions."""
    torch.manual_seed(m + n)
    u, s, vh = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    weight = u @ torch.diag(1 / torch.arange(1.0, s.numel() + 1)) @ vh
    return weight, weight + 0.05 * torch.randn(m, n)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (1, 7), (64, 64)], ids=str)
def test_it_is_that_of_a_decomposition_in_float64(shape: tuple[int, int]) -> None:
    weight, grad = collapsed(*shape)
    assert float(jacobian_energy(weight, grad)) == pytest.approx(
        oracle(weight, grad), abs=TOLERANCE
    )
    noise = torch.randn(shape)
    assert float(jacobian_energy(noise, grad)) == pytest.approx(oracle(noise, grad), abs=TOLERANCE)


def test_a_matrix_too_large_to_decompose_agrees_where_it_has_collapsed() -> None:
    weight, grad = collapsed(160, 200)
    assert float(jacobian_energy(weight, grad)) == pytest.approx(
        oracle(weight, grad), abs=TOLERANCE
    )


def test_rank_one_with_its_own_gradient_is_one_and_with_an_orthogonal_one_is_zero() -> None:
    u, v = torch.eye(6)[:, :2], torch.eye(9)[:, :2]
    weight = 3.0 * torch.outer(u[:, 0], v[:, 0])
    assert float(jacobian_energy(weight, -0.1 * weight)) == pytest.approx(1.0, abs=TOLERANCE)
    assert float(jacobian_energy(weight, torch.outer(u[:, 1], v[:, 1]))) == 0
    # Same row space, another column space: the pair (u, v) counts, not v alone.
    assert float(jacobian_energy(weight, torch.outer(u[:, 1], v[:, 0]))) == 0


def test_all_directions_of_an_identity_are_dominant() -> None:
    """⌊SR⌋ must be n although rounding may put SR below n."""
    assert float(jacobian_energy(torch.eye(7) * 0.3, torch.eye(7))) == pytest.approx(
        1.0, abs=TOLERANCE
    )
    capped = jacobian_energy(torch.eye(8), torch.diag(torch.tensor([1.0] * 8)), max_rank=2)
    assert float(capped) == pytest.approx(0.25, abs=TOLERANCE)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 64.0, 1e30])
def test_clipping_and_scaling_do_not_change_it(factor: float) -> None:
    weight, grad = collapsed(16, 24)
    expected = float(jacobian_energy(weight, grad))
    assert float(jacobian_energy(weight, grad * factor)) == pytest.approx(expected, abs=TOLERANCE)
    assert float(jacobian_energy(weight * factor, grad)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_harms_no_other(bad: float) -> None:
    weight, grad = collapsed(8, 8)
    weights, grads = weight.expand(4, 8, 8).clone(), grad.expand(4, 8, 8).clone()
    weights[0, 0, 0] = bad
    grads[1, 3, 3] = bad
    grads[2] = 0
    found = jacobian_energy(weights, grads).tolist()
    assert math.isnan(found[0])
    assert math.isnan(found[1])
    assert found[2] == 0
    assert found[3] == pytest.approx(oracle(weight, grad), abs=TOLERANCE)
    assert float(jacobian_energy(torch.zeros(3, 4), torch.ones(3, 4))) == 0


def prepared(make: type) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    torch.manual_seed(2)
    model = make()
    rows = token_rows(4)
    model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    return model, named_parameters_canonical(model)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_matrix_of_a_model_is_measured(make: type) -> None:
    model, parameters = prepared(make)
    views = select_matrices(model).matrices
    measured = measure_jacobian_energies(views, parameters, BACKEND)
    assert sorted(measured) == sorted(matrix_names(views))
    for view in views:
        parameter = parameters[view.parameter_name]
        expected = oracle(view.read(parameter), view.read(parameter.grad))
        assert measured[view.name] == pytest.approx(expected, abs=TOLERANCE)


def test_matrices_without_a_gradient_are_left_out() -> None:
    model, parameters = prepared(gpt2)
    views = select_matrices(model).matrices
    name = "transformer.h.0.mlp.c_fc.weight"
    parameters[name].grad = None
    measured = measure_jacobian_energies(views, parameters, BACKEND)
    assert set(matrix_names(views)) - set(measured) == {name}
    assert measure_jacobian_energies((), {}, BACKEND) == {}
