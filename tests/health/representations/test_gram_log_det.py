"""Log-determinants against slogdet of the Gram matrix in float64, and their bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_pss.health.representations import log_det_bounds

RIDGE = 1e-3
# In nats a token, over the shapes and clouds below.
TOLERANCES = {
    torch.float64: 2.5e-13,  # 8.6e-14
    torch.float32: 1.9e-6,  # 6.4e-7
    torch.bfloat16: 1.4e-6,  # 4.6e-7
}
# In nats, of slogdet at a condition number of 6e7.
ROUNDING = 1.4e-8  # 4.8e-9


def gram_log_det(tokens: Tensor, *, ridge: float = RIDGE) -> Tensor:
    return log_det_bounds(tokens, tokens.shape[-2], ridge=ridge).sample


def oracle(tokens: Tensor, ridge: float = RIDGE) -> float:
    x = tokens.double()
    norms = x.norm(dim=-1, keepdim=True)
    unit = x / torch.where(norms > 0, norms, 1.0)
    gram = unit @ unit.mT + ridge * torch.eye(len(x), dtype=torch.float64)
    return float(torch.linalg.slogdet(gram).logabsdet)


def cloud(n: int, d: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 16), (64, 256)], ids=str)
def test_it_is_that_of_the_gram_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mean in (0.0, 1.0, 30.0):
        tokens = cloud(*shape, mean).to(dtype)
        found = float(gram_log_det(tokens))
        assert found == pytest.approx(oracle(tokens), abs=TOLERANCES[dtype] * len(tokens))


def test_collapse_lowers_it_to_the_end_of_its_range() -> None:
    n = 12
    one_line = n * math.log(RIDGE) + math.log1p(n / RIDGE)
    orthogonal = n * math.log1p(RIDGE)
    assert float(gram_log_det(torch.ones(n, 20).double())) == pytest.approx(one_line)
    assert float(gram_log_det(torch.eye(n, 20).double())) == pytest.approx(orthogonal)
    values = [float(gram_log_det(cloud(n, 20, mean))) for mean in (0.0, 1.0, 3.0, 10.0)]
    assert values == sorted(values, reverse=True)
    assert one_line < values[-1] < values[0] < orthogonal


@pytest.mark.parametrize("shape", [(60, 8), (60, 40), (60, 100), (60, 1)], ids=str)
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_every_sample_bounds_the_whole(shape: tuple[int, int], ridge: float) -> None:
    for mean in (0.0, 1.0, 10.0):
        tokens = cloud(*shape, mean)
        whole = oracle(tokens, ridge)
        widths = []
        for size in (1, 7, 30, 59, 60):
            bounds = log_det_bounds(tokens[:size], len(tokens), ridge=ridge)
            assert float(bounds.lower) <= whole + ROUNDING
            assert float(bounds.upper) >= whole - ROUNDING
            widths.append(float(bounds.upper - bounds.lower))
        assert widths[-1] == pytest.approx(0.0, abs=ROUNDING)
        # More tokens never widen it: the larger sample's tokens are among those allowed before.
        assert all(b <= a + ROUNDING for a, b in itertools.pairwise(widths))


def test_the_lower_bound_is_attained() -> None:
    sample = cloud(10, 6)
    unit = sample / sample.norm(dim=-1, keepdim=True)
    first = torch.linalg.svd(unit).Vh[0]
    whole = torch.cat([sample, first.expand(15, 6)])
    bounds = log_det_bounds(sample, 25)
    assert float(bounds.lower) == pytest.approx(oracle(whole), abs=ROUNDING)


def test_the_upper_bound_is_attained_where_dimensions_are_left() -> None:
    """By Fischer and Hadamard: the other tokens are orthogonal to the sample and to each other."""
    eye = torch.eye(12, dtype=torch.float64)
    sample = torch.cat([cloud(5, 4), torch.zeros(5, 8, dtype=torch.float64)], dim=1)
    bounds = log_det_bounds(sample, 10)
    assert float(bounds.upper) == pytest.approx(oracle(torch.cat([sample, eye[4:9]])), abs=ROUNDING)
    assert float(bounds.upper) == pytest.approx(float(bounds.sample) + 5 * math.log1p(RIDGE))


@pytest.mark.parametrize("num_others", [12, 4, 2])
def test_the_upper_bound_is_attained_where_they_are_not(num_others: int) -> None:
    """Water-filling: unequal directions are filled up to one level, at most one a token."""
    energies = torch.tensor([2.0, 1.5, 1.0, 0.8, 0.5, 0.2], dtype=torch.float64)  # of 6 tokens
    low = energies.flip(0)[:num_others]
    level = (float(low.sum()) + num_others) / len(low)
    assert level > float(low.max())
    filled = torch.where(energies <= low.max(), level - energies, 0.0)
    sample, others = with_energies(energies, 6), with_energies(filled, num_others)
    bounds = log_det_bounds(sample, 6 + num_others)
    whole = oracle(torch.cat([sample, others]))
    assert float(bounds.upper) == pytest.approx(whole, abs=ROUNDING)
    assert float(bounds.upper) < float(bounds.sample) + num_others * math.log1p(RIDGE)


def with_energies(energies: Tensor, n: int) -> Tensor:
    """Return n unit rows whose sum of outer products is diag(energies), of trace n.

    Rotates pairs of rows of a square root, one below length 1 and one above, until each has
    length 1 (the constructive proof of the Schur–Horn theorem).
    """
    root = torch.diag(energies.sqrt())[energies > 0]
    x = torch.zeros(n, len(energies), dtype=torch.float64)
    x[: len(root)] = root
    for _ in range(n):
        lengths = x.square().sum(dim=-1)
        low, high = int(lengths.argmin()), int(lengths.argmax())
        if lengths[high] - lengths[low] < 1e-14:
            break
        a, b, c = float(lengths[low]), float(lengths[high]), float(x[low] @ x[high])
        # ‖cos·low + sin·high‖² = 1, as a quadratic in t = tan.
        p, q, r = b - 1, 2 * c, a - 1
        t = (-q + math.sqrt(q * q - 4 * p * r)) / (2 * p)
        cos, sin = 1 / math.hypot(1, t), t / math.hypot(1, t)
        x[[low, high]] = torch.stack([cos * x[low] + sin * x[high], -sin * x[low] + cos * x[high]])
    return x


def test_samples_that_are_broken_empty_or_zero() -> None:
    tokens = cloud(6, 4).float().expand(4, 6, 4).clone()
    tokens[1, 2, 0] = math.nan
    tokens[2, 2, 0] = math.inf
    tokens[3] = 0
    bounds = log_det_bounds(tokens, 9)
    for values in (bounds.sample, bounds.lower, bounds.upper):
        assert values.isnan().tolist() == [False, True, True, False]
    assert float(bounds.sample[0]) == pytest.approx(
        oracle(tokens[0]), abs=6 * TOLERANCES[torch.float32]
    )
    assert float(bounds.sample[3]) == pytest.approx(6 * math.log(RIDGE))
    for shape in ((0, 0), (0, 4), (3, 0)):
        assert math.isnan(float(gram_log_det(torch.ones(shape))))
        assert math.isnan(float(log_det_bounds(torch.ones(shape), 5).upper))


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e38])
def test_lengths_do_not_matter(factor: float) -> None:
    tokens = cloud(9, 5).float()
    tokens = tokens / tokens.abs().max()
    found = float(gram_log_det(tokens * factor))
    assert found == pytest.approx(oracle(tokens), abs=TOLERANCES[torch.float32] * 9)
