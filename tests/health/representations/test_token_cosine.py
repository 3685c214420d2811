"""Mean pairwise cosine against the whole matrix of cosines in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_pss.health.representations import token_cosine

# Absolute, of a mean in [−1, 1], over the shapes and seeds below.
TOLERANCES = {
    torch.float64: 1.3e-15,  # 4.4e-16
    torch.float32: 1.3e-7,  # 4.3e-8
    torch.bfloat16: 3.6e-7,  # 1.2e-7
}
# The same, of lengths from 1e-40 to 1e38, and of equal tokens.
SCALED_TOLERANCE = 5e-7  # 1.8e-7


def oracle(tokens: Tensor) -> float:
    x = tokens.double()
    norms = x.norm(dim=-1, keepdim=True)
    unit = x / torch.where(norms > 0, norms, 1.0)
    n = len(x)
    cosines = unit @ unit.mT
    return float(cosines.masked_select(~torch.eye(n, dtype=torch.bool)).mean())


def cloud(n: int, d: int, mean: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (40, 8), (256, 64)], ids=str)
def test_it_is_the_mean_of_all_cosines(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mean in (0.0, 1.0, 30.0):
        tokens = cloud(*shape, mean).to(dtype)
        found = float(token_cosine(tokens))
        assert found == pytest.approx(oracle(tokens), abs=TOLERANCES[dtype])


def test_collapse_and_its_opposite() -> None:
    assert float(token_cosine(torch.ones(7, 3))) == pytest.approx(1.0, abs=SCALED_TOLERANCE)
    assert float(token_cosine(cloud(200, 64, 3.0))) > 0.8
    assert abs(float(token_cosine(cloud(200, 64, 0.0)))) < 3 * math.sqrt(2 / 64) / 200
    simplex = torch.eye(5) - 0.2
    assert float(token_cosine(simplex)) == pytest.approx(-1 / 4, abs=SCALED_TOLERANCE)


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e38])
def test_lengths_do_not_matter(factor: float) -> None:
    tokens = cloud(20, 4, 1.0).float()
    tokens = tokens / tokens.abs().max()
    expected = oracle(tokens)
    lengths = torch.logspace(-2, 0, 20).unsqueeze(-1)
    assert float(token_cosine(tokens * factor)) == pytest.approx(expected, abs=SCALED_TOLERANCE)
    assert float(token_cosine(tokens * lengths)) == pytest.approx(expected, abs=SCALED_TOLERANCE)


def test_zeros_count_as_orthogonal_and_broken_samples_harm_no_other() -> None:
    tokens = cloud(6, 4, 1.0).float().expand(5, 6, 4).clone()
    tokens[1, 2] = 0
    tokens[2, 3, 1] = math.nan
    tokens[3, 0, 0] = -math.inf
    tokens[4] = 0
    found = token_cosine(tokens).tolist()
    assert found[0] == pytest.approx(oracle(tokens[0]), abs=SCALED_TOLERANCE)
    assert found[1] == pytest.approx(oracle(tokens[1]), abs=SCALED_TOLERANCE)
    assert math.isnan(found[2])
    assert math.isnan(found[3])
    assert found[4] == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (1, 4)], ids=str)
def test_fewer_than_two_tokens_have_no_cosine(shape: tuple[int, int]) -> None:
    assert math.isnan(float(token_cosine(torch.ones(shape))))
