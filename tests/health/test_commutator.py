"""The commutator's size against the dense Hessian of a small network in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.health.update_operator import commutator_size

NUM_DIRECTIONS = 400
SAMPLING_TOLERANCE = 0.008  # 0.0029, relative


def network() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[nn.Parameter], Tensor]:
    """Return Hessian–vector products by autograd, the parameters, and the dense Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    parameters = list(model.parameters())

    def product(z: Sequence[Tensor]) -> list[Tensor]:
        loss = nn.functional.mse_loss(model(x), y)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(grads, parameters, grad_outputs=list(z)))

    sizes = [p.numel() for p in parameters]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        z = [a.reshape(p.shape) for a, p in zip(unit.split(sizes), parameters, strict=True)]
        columns.append(torch.cat([a.flatten() for a in product(z)]))
    return product, parameters, torch.stack(columns, dim=-1)


def test_it_is_the_norm_of_the_dense_commutator() -> None:
    product, parameters, hessian = network()
    d = [torch.rand_like(p) + 0.1 for p in parameters]
    m = torch.diag(1 / torch.cat([a.flatten() for a in d]))
    dense = hessian @ m - m @ hessian
    expected = float(torch.linalg.matrix_norm(dense)) / math.sqrt(len(dense))
    found = commutator_size(product, d, num_directions=NUM_DIRECTIONS)
    assert float(found) == pytest.approx(expected, rel=SAMPLING_TOLERANCE)
    assert float(found) <= float(torch.linalg.matrix_norm(dense, 2))


def test_a_multiple_of_the_identity_commutes() -> None:
    product, parameters, _ = network()
    d = [torch.full_like(p, 0.25) for p in parameters]
    assert float(commutator_size(product, d)) == 0


def test_directions_are_those_of_the_seed_and_leave_the_global_state_alone() -> None:
    product, parameters, _ = network()
    d = [torch.rand_like(p) + 0.1 for p in parameters]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = commutator_size(product, d, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(commutator_size(product, d, seed=1), first)
    assert not torch.equal(commutator_size(product, d, seed=2), first)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_nan(bad: float) -> None:
    d = [torch.ones(2, 2)]
    assert math.isnan(float(commutator_size(lambda z: [z[0] * bad], d)))


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        commutator_size(list, [])
    with pytest.raises(ConfigurationError, match="at least one"):
        commutator_size(list, [torch.ones(2)], num_directions=0)
