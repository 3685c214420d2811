"""Hutchinson's trace against the dense Hessian's diagonal."""

from __future__ import annotations

import math

import pytest
import torch
from hessian_cases import dense_hessian, network, quadratic
from torch import nn

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.curvature import Hessian, hessian_trace

# In standard errors: the worst of 30 blocks in five networks.
MAX_STANDARD_ERRORS = 3.5  # 2.1
# Of the standard error, from 2,000 probes.
ERROR_TOLERANCE = 0.06  # 0.023
# float64 sums of 47 numbers.
SUM_TOLERANCE = 1e-13


def blocks(matrix: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    index = torch.arange(len(matrix)).split(list(sizes))
    return [matrix[i][:, i] for i in index]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_block_is_met_within_its_standard_error(dtype: torch.dtype) -> None:
    for seed in range(5):
        model, loss = network(dtype, seed)
        exact, exact_loss = network(torch.float64, seed)
        exact.load_state_dict(model.state_dict())
        hessian = Hessian(loss, dict(model.named_parameters()))
        found = hessian_trace(hessian, num_probes=64)
        dense = blocks(dense_hessian(exact, exact_loss), hessian.sizes)
        assert list(found.by_parameter) == list(hessian.names)
        for block, estimate in zip(dense, found.by_parameter.values(), strict=True):
            distance = abs(estimate.mean - float(block.trace()))
            assert distance <= MAX_STANDARD_ERRORS * estimate.standard_error
        parts = sum(estimate.mean for estimate in found.by_parameter.values())
        assert found.total.mean == pytest.approx(parts, abs=SUM_TOLERANCE)
        assert found.num_products == 64


def test_the_standard_error_is_that_of_the_formula() -> None:
    """Var v_pᵀ(Hv)_p = 2 Σ_{i≠j∈p} H_ij² + Σ_{i∈p, j∉p} H_ij²."""
    model, loss = network()
    hessian = Hessian(loss, dict(model.named_parameters()))
    dense = dense_hessian(model, loss)
    found = hessian_trace(hessian, num_probes=2000)
    rows = dense.split(list(hessian.sizes))
    for block, row, estimate in zip(
        blocks(dense, hessian.sizes), rows, found.by_parameter.values(), strict=True
    ):
        inside = block.square().sum() - block.diagonal().square().sum()
        across = row.square().sum() - block.square().sum()
        expected = math.sqrt(float(2 * inside + across) / 2000)
        assert estimate.standard_error == pytest.approx(expected, rel=ERROR_TOLERANCE)


def test_a_diagonal_hessian_has_no_error() -> None:
    named, loss = quadratic(torch.diag(torch.tensor([1.0, -2.0, 4.0])))
    found = hessian_trace(Hessian(loss, named), num_probes=3)
    assert (found.total.mean, found.total.standard_error) == (3.0, 0.0)


def test_one_probe_knows_no_error_and_a_broken_loss_no_mean() -> None:
    named, loss = quadratic(torch.eye(3))
    assert math.isnan(hessian_trace(Hessian(loss, named), num_probes=1).total.standard_error)
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    hessian = Hessian(
        lambda: good.square().sum() + (bad**2 * math.nan).sum(), {"good": good, "bad": bad}
    )
    found = hessian_trace(hessian, num_probes=2)
    assert math.isnan(found.total.mean)
    assert math.isnan(found.by_parameter["bad"].mean)
    assert found.by_parameter["good"].mean == 4.0


def test_no_probes() -> None:
    named, loss = quadratic(torch.eye(3))
    with pytest.raises(ConfigurationError, match="num_probes=0"):
        hessian_trace(Hessian(loss, named), num_probes=0)
