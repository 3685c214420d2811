"""Collapse measures against decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_pss.health.representations import CollapseMeasures, collapse_measures

# Relative, over the shapes and means below.
TOLERANCES = {
    torch.float64: 1e-14,  # 0: the same operations
    torch.float32: 1.9e-6,  # 6.5e-7
    torch.bfloat16: 1.5e-6,  # 5.2e-7
}


def cloud(n: int, d: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(n + d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def oracle(tokens: Tensor) -> tuple[float, float, float, float]:
    x = tokens.double()
    sigma = torch.linalg.svdvals(x)
    centred = torch.linalg.svdvals(x - x.mean(dim=0))
    p = sigma / sigma.sum()
    return (
        float(len(x) * x.mean(dim=0).square().sum() / x.square().sum()),
        float(sigma[0] ** 2 / sigma.square().sum()),
        float(centred[0] ** 2 / centred.square().sum()),
        float((-(p * p.log()).sum()).exp()),
    )


def numbers(measures: CollapseMeasures) -> tuple[float, float, float, float]:
    return (
        float(measures.mean_share),
        float(measures.top_share),
        float(measures.centred_top_share),
        float(measures.effective_rank),
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (40, 16), (64, 256)], ids=str)
def test_they_are_those_of_a_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mean in (0.0, 1.0, 5.0):
        tokens = cloud(*shape, mean).to(dtype)
        found = numbers(collapse_measures(tokens))
        assert found == pytest.approx(oracle(tokens), rel=TOLERANCES[dtype])
        assert found[1] >= found[0]


def test_equal_tokens_have_collapsed_and_centred_ones_have_no_mean() -> None:
    row = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert numbers(collapse_measures(row.expand(5, 8))) == pytest.approx(
        (1.0, 1.0, 0.0, 1.0), abs=2e-6
    )
    tokens = cloud(20, 8).float()
    assert float(collapse_measures(tokens - tokens.mean(dim=0)).mean_share) < 7e-16  # 2.5e-16


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e38])
def test_a_factor_does_not_matter(factor: float) -> None:
    tokens = cloud(12, 6, 1.0).float()
    tokens = tokens / tokens.abs().max()
    found = numbers(collapse_measures(tokens * factor))
    assert found == pytest.approx(oracle(tokens), rel=TOLERANCES[torch.float32])


def test_samples_that_are_broken_empty_or_zero() -> None:
    tokens = cloud(6, 4).float().expand(4, 6, 4).clone()
    tokens[1, 2, 0] = math.nan
    tokens[2, 2, 0] = math.inf
    tokens[3] = 0
    measures = collapse_measures(tokens)
    for values in (
        measures.mean_share,
        measures.top_share,
        measures.centred_top_share,
        measures.effective_rank,
    ):
        assert values.isnan().tolist() == [False, True, True, False]
        assert float(values[3]) == 0
    for shape in ((0, 0), (0, 4), (3, 0)):
        assert all(math.isnan(value) for value in numbers(collapse_measures(torch.ones(shape))))
    one = numbers(collapse_measures(torch.ones(1, 4)))
    assert one == pytest.approx((1.0, 1.0, 0.0, 1.0))
