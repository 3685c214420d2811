"""Stochastic Lanczos quadrature against the eigenvalues of the dense Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from hessian_cases import dense_hessian, network, quadratic, symmetric
from torch import nn

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.curvature import Hessian, hessian_density, rademacher

# Of max |λ|^p, p < 2 · steps, in float64; at p = 2 · steps it is off by 3.7e-5.
MOMENT_TOLERANCE = 4.5e-16  # 1.4e-17, and two ulps where p = 0
# L1 distance of two smoothed densities of 300 eigenvalues, 16 probes, width 0.1, of three seeds.
DENSITY_TOLERANCE = 0.1  # 0.058
# Of the share below 0, of three seeds.
SHARE_TOLERANCE = 0.04  # 0.015


def test_moments_are_exact_up_to_twice_the_steps() -> None:
    """This is what makes nodes and weights a Gauss quadrature."""
    model, loss = network()
    hessian = Hessian(loss, dict(model.named_parameters()))
    v = rademacher(hessian, torch.Generator().manual_seed(5))
    density = hessian_density(hessian, num_probes=1, num_steps=4, seed=5)
    dense = dense_hessian(model, loss)
    image = v / len(v)
    for power in range(8):
        expected = float(v @ image)
        scale = float(torch.linalg.eigvalsh(dense).abs().max()) ** power
        assert density.mean_of_power(power) == pytest.approx(expected, abs=MOMENT_TOLERANCE * scale)
        image = dense @ image
    beyond = float(v @ image)
    assert abs(density.mean_of_power(8) - beyond) > 1e-5 * scale


def test_the_smoothed_density_is_that_of_the_eigenvalues() -> None:
    torch.manual_seed(0)
    noise = torch.randn(300, 300, dtype=torch.float64)
    matrix = (noise + noise.mT) / math.sqrt(600)
    expected = torch.linalg.eigvalsh(matrix)
    named, loss = quadratic(matrix)
    density = hessian_density(Hessian(loss, named), num_probes=16, num_steps=40)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    smoothed = density.smoothed(grid, width=0.1)
    bells = torch.distributions.Normal(expected, 0.1).log_prob(grid.unsqueeze(-1)).exp()
    assert float(torch.trapezoid(smoothed, grid)) == pytest.approx(1.0, abs=1e-9)
    distance = float(torch.trapezoid((smoothed - bells.mean(dim=-1)).abs(), grid))
    assert distance <= DENSITY_TOLERANCE
    assert density.share_below(0.0) == pytest.approx(0.5, abs=SHARE_TOLERANCE)
    assert density.num_products == 640


def test_few_distinct_eigenvalues_end_the_run_early_with_their_shares() -> None:
    matrix = symmetric(torch.tensor([4.0] + [0.0] * 63, dtype=torch.float64))
    named, loss = quadratic(matrix)
    density = hessian_density(Hessian(loss, named), num_probes=8)
    # Two a probe; rounding makes a third where the probe hardly touches the outlier.
    assert 16 <= density.num_products < 24
    assert float(density.weights.sum()) == pytest.approx(1.0)
    is_outlier = density.nodes > 2
    assert density.nodes[is_outlier].tolist() == pytest.approx([4.0] * 8)
    assert float(density.nodes[~is_outlier].abs().max()) < 1e-12
    # One in 64; its scatter over probes is about 1/64 · √(2/8).
    assert float(density.weights[is_outlier].sum()) == pytest.approx(1 / 64, abs=3 / 128)


def test_the_width_follows_the_range_so_that_units_do_not_matter() -> None:
    model, loss = network()
    named = dict(model.named_parameters())
    plain = hessian_density(Hessian(loss, named), num_probes=2)
    scaled = hessian_density(Hessian(lambda: 1000 * loss(), named), num_probes=2)
    grid = torch.linspace(-1, 2, 50, dtype=torch.float64)
    assert torch.allclose(plain.smoothed(grid), 1000 * scaled.smoothed(1000 * grid), rtol=1e-6)


def test_zero_and_broken_hessians() -> None:
    named, loss = quadratic(torch.zeros(4, 4))
    zero = hessian_density(Hessian(loss, named), num_probes=2)
    assert zero.nodes.tolist() == [0.0, 0.0]
    assert bool(zero.smoothed(torch.zeros(1)).isfinite().all())
    w = nn.Parameter(torch.ones(3))
    broken = hessian_density(Hessian(lambda: (w**2 * math.nan).sum(), {"w": w}))
    assert math.isnan(broken.share_below(0.0))
    assert math.isnan(broken.mean_of_power(1))
    assert bool(broken.smoothed(torch.zeros(2)).isnan().all())


def test_counts_and_widths_without_meaning() -> None:
    named, loss = quadratic(torch.eye(2))
    hessian = Hessian(loss, named)
    for options in ({"num_probes": 0}, {"num_steps": 0}):
        with pytest.raises(ConfigurationError, match="1 or more of each"):
            hessian_density(hessian, **options)
    with pytest.raises(ConfigurationError, match="width=0"):
        hessian_density(hessian).smoothed(torch.zeros(1), width=0.0)
