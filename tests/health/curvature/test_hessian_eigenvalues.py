"""Extreme eigenvalues against eigvalsh of the dense Hessian in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hessian_cases import dense_hessian, network, quadratic, symmetric
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.curvature import Hessian, hessian_eigenvalues, lanczos

# Of max |λ|, over five networks, three eigenvalues at either end, run to the end.
TOLERANCES = {
    torch.float64: 3.6e-15,  # 1.2e-15
    torch.float32: 3.4e-7,  # 1.2e-7
    torch.bfloat16: 4.3e-3,  # 1.5e-3
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_both_ends_are_those_of_the_dense_hessian(dtype: torch.dtype) -> None:
    for seed in range(5):
        model, loss = network(dtype, seed)
        exact, exact_loss = network(torch.float64, seed)
        exact.load_state_dict(model.state_dict())
        expected = torch.linalg.eigvalsh(dense_hessian(exact, exact_loss))
        hessian = Hessian(loss, dict(model.named_parameters()))
        found = hessian_eigenvalues(hessian, num_eigenvalues=3, tolerance=1e-9)
        tolerance = TOLERANCES[dtype] * float(expected.abs().max())
        assert found.largest == pytest.approx(expected.flip(0)[:3].tolist(), abs=tolerance)
        assert found.smallest == pytest.approx(expected[:3].tolist(), abs=tolerance)


def test_residuals_bound_the_error_of_a_run_cut_short() -> None:
    matrix = symmetric(torch.linspace(-1, 1, 200, dtype=torch.float64))
    expected = torch.linalg.eigvalsh(matrix)
    named, loss = quadratic(matrix)
    found = hessian_eigenvalues(Hessian(loss, named), num_eigenvalues=2, num_steps=12)
    assert found.num_products == 12
    pairs = zip(
        found.largest + found.smallest,
        found.largest_residuals + found.smallest_residuals,
        strict=True,
    )
    for value, residual in pairs:
        assert 1e-3 < residual
        assert float((expected - value).abs().min()) <= residual
    assert found.largest[0] < float(expected[-1])
    assert found.smallest[0] > float(expected[0])


def test_it_stops_when_the_residuals_say_so() -> None:
    matrix = symmetric(torch.cat([torch.tensor([9.0, -7.0]), torch.linspace(-0.1, 0.1, 198)]))
    named, loss = quadratic(matrix.double())
    found = hessian_eigenvalues(Hessian(loss, named), tolerance=1e-3)
    assert found.num_products < 12
    assert found.largest_residuals[0] <= 9e-3
    assert found.largest[0] == pytest.approx(9.0, abs=1e-4)
    assert found.smallest[0] == pytest.approx(-7.0, abs=1e-4)


def power_iteration(matrix: Tensor, count: int) -> list[float]:
    """PyHessian's ``eigenvalues``: power iteration, each vector kept orthogonal to those before."""
    vectors: list[Tensor] = []
    values = []
    torch.manual_seed(0)
    for _ in range(count):
        v = torch.randn(len(matrix), dtype=matrix.dtype)
        for _ in range(400):
            for u in vectors:
                v = v - (v @ u) * u
            v = v / v.norm()
            image = matrix @ v
            value, v = float(v @ image), image / image.norm()
        values.append(value)
        vectors.append(v)
    return values


def test_magnitude_is_what_power_iteration_finds_and_largest_is_not() -> None:
    matrix = symmetric(torch.tensor([-8.0, 5.0, 3.0, 1.0, 0.5, -0.2], dtype=torch.float64))
    named, loss = quadratic(matrix)
    found = hessian_eigenvalues(Hessian(loss, named), num_eigenvalues=3, tolerance=1e-12)
    assert found.by_magnitude == pytest.approx(power_iteration(matrix, 3), abs=1e-12)
    assert found.by_magnitude[0] == pytest.approx(-8.0)
    assert found.largest[0] == pytest.approx(5.0)


def test_a_strong_outlier_does_not_come_back_as_a_ghost() -> None:
    """Without reorthogonalisation 60 steps in float32 find the 1000 twenty-two times."""
    matrix = symmetric(torch.cat([torch.tensor([1000.0]), torch.linspace(0, 1, 299)]))
    start = torch.randn(300, generator=torch.Generator().manual_seed(0))
    values, _ = lanczos(lambda v: matrix @ v, start, 60).ritz()
    assert int((values > 2).sum()) == 1


def test_an_exhausted_space_is_left_and_multiple_eigenvalues_are_found() -> None:
    matrix = symmetric(torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0], dtype=torch.float64))
    named, loss = quadratic(matrix)
    found = hessian_eigenvalues(Hessian(loss, named), num_eigenvalues=3)
    assert found.largest == pytest.approx([2.0, 2.0, 2.0])
    assert found.smallest == pytest.approx([-1.0, -1.0, 2.0])


def test_few_parameters_give_few_eigenvalues() -> None:
    named, loss = quadratic(torch.diag(torch.tensor([1.0, 2.0, -4.0])))
    found = hessian_eigenvalues(Hessian(loss, named), num_eigenvalues=2, num_steps=5)
    assert found.largest == pytest.approx([2.0, 1.0])
    assert found.smallest == pytest.approx([-4.0, 1.0])
    assert found.by_magnitude == pytest.approx([-4.0, 2.0])
    one = hessian_eigenvalues(Hessian(loss, named), num_eigenvalues=9, num_steps=9)
    assert one.largest == pytest.approx([2.0, 1.0, -4.0])


def test_zero_and_broken_hessians() -> None:
    named, loss = quadratic(torch.zeros(4, 4))
    found = hessian_eigenvalues(Hessian(loss, named))
    assert found.largest == found.smallest == (0.0,)
    w = nn.Parameter(torch.ones(3))
    for bad in (math.nan, math.inf):
        hessian = Hessian(lambda bad=bad: (w**2 * bad).sum(), {"w": w})
        found = hessian_eigenvalues(hessian, num_eigenvalues=2)
        assert all(math.isnan(value) for value in found.largest + found.smallest)
        assert found.num_products == 1


def test_the_seed_decides() -> None:
    model, loss = network(torch.float32)
    hessian = Hessian(loss, dict(model.named_parameters()))
    first, again, other = (
        hessian_eigenvalues(hessian, num_steps=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_counts_without_meaning() -> None:
    named, loss = quadratic(torch.eye(2))
    hessian = Hessian(loss, named)
    for options in ({"num_eigenvalues": 0}, {"num_eigenvalues": 4, "num_steps": 3}):
        with pytest.raises(ConfigurationError, match="at least as many steps"):
            hessian_eigenvalues(hessian, **options)
