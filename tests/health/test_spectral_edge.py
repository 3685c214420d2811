"""The spectral edge against a dense decomposition of the updates themselves, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor, nn

from hf_pss.health.update_metrics import SpectralEdgeMeter, spectral_edge
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices

BACKEND = Backend()
TOLERANCE = 1e-12  # relative
# Of the ratio, the worst of the seeds below: blocks of 16 and of 64, six matrices and fourteen.
RATIO_BAND = 0.15  # 0.073, relative
WIDE_RATIO_BAND = 0.05  # 0.022

Views = tuple[MatrixView, ...]


def window(sigmas: list[float], num_weights: int, seed: int = 0) -> Tensor:
    """Return updates (W, P) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    w = len(sigmas)
    left = torch.linalg.qr(torch.randn(w, w, generator=generator, dtype=torch.float64)).Q
    right = torch.randn(num_weights, w, generator=generator, dtype=torch.float64)
    return left @ (torch.tensor(sigmas, dtype=torch.float64)[:, None] * torch.linalg.qr(right).Q.mT)


@pytest.mark.parametrize(
    ("sigmas", "position"),
    [([9.0, 8.0, 2.0, 1.5], 2), ([5.0, 1.0, 0.9, 0.8], 1), ([4.0, 3.0, 2.0, 0.1], 3)],
)
def test_the_largest_gap_is_found(sigmas: list[float], position: int) -> None:
    found = spectral_edge(window(sigmas, 300))
    assert found.sigmas == pytest.approx(sigmas, rel=TOLERANCE)
    assert found.position == position
    assert found.ratio == pytest.approx(sigmas[position - 1] / sigmas[position], rel=TOLERANCE)


def test_it_is_that_of_the_gram_matrix() -> None:
    updates = torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(updates @ updates.mT).flip(0)
    assert spectral_edge(updates).sigmas == pytest.approx(eigenvalues.sqrt().tolist())


def test_rounding_is_not_a_mode() -> None:
    line = torch.outer(torch.arange(1.0, 6.0), torch.randn(50))
    found = spectral_edge(line)
    assert (found.position, found.ratio) == (1, math.inf)
    nothing = spectral_edge(torch.zeros(4, 9))
    assert nothing.position == 0
    assert math.isnan(nothing.ratio)
    assert spectral_edge(torch.eye(5)[:, :2]).position == 2  # fewer weights than updates


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_update_has_no_edge(bad: float) -> None:
    updates = window([3.0, 2.0, 1.0], 40)
    updates[1, 7] = bad
    found = spectral_edge(updates)
    assert all(math.isnan(sigma) for sigma in found.sigmas)
    assert (found.position, math.isnan(found.ratio)) == (0, True)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_does_not_matter(factor: float) -> None:
    updates = window([3.0, 2.0, 0.1], 40).float()
    found, expected = spectral_edge(updates * factor), spectral_edge(updates)
    assert found.position == expected.position
    assert found.ratio == pytest.approx(expected.ratio, rel=1e-5)


def flat(views: Views, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([view.read(tensors[view.parameter_name]).flatten() for view in views])


def play(
    views: Views,
    parameters: dict[str, nn.Parameter],
    meter: SpectralEdgeMeter,
    sigmas: list[float],
    seed: int,
) -> tuple[float, int, float, int]:
    """Apply updates of a known spectrum; return the true gap and the measured one."""
    selected = list(dict.fromkeys(view.parameter_name for view in views))
    sizes = [parameters[name].numel() for name in selected]
    updates = window(sigmas, sum(sizes), seed)
    seen = [flat(views, parameters).double()]
    found = meter.measure(parameters)
    for update in updates:
        assert found is None
        with torch.no_grad():
            for name, change in zip(selected, update.split(sizes), strict=True):
                parameters[name].add_(change.reshape(parameters[name].shape))
        seen.append(flat(views, parameters).double())
        found = meter.measure(parameters)
    exact = spectral_edge(torch.stack(seen).diff(dim=0))
    assert found is not None
    return found.ratio, found.position, exact.ratio, exact.position


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [gpt2, llama])
def test_projections_keep_the_gap(make: type, seed: int) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    sigmas = [0.3, 0.25, 0.05, 0.04, 0.03]
    for width, band in ((16, RATIO_BAND), (64, WIDE_RATIO_BAND)):
        meter = SpectralEdgeMeter(views, BACKEND, window_size=5, width=width)
        ratio, position, exact, exact_position = play(views, parameters, meter, sigmas, seed)
        assert position == exact_position == 2
        assert ratio == pytest.approx(exact, rel=band)


def test_a_check_that_can_fail() -> None:
    model = gpt2()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    meter = SpectralEdgeMeter(views, BACKEND, window_size=4, width=1)
    ratio, _, exact, _ = play(views, parameters, meter, [0.3, 0.25, 0.05, 0.04], 0)
    assert ratio != pytest.approx(exact, rel=WIDE_RATIO_BAND)


def test_the_window_moves_on_and_projections_are_the_same_every_time() -> None:
    torch.manual_seed(3)
    model = gpt2()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    meters = [SpectralEdgeMeter(views, BACKEND, window_size=3) for _ in range(2)]
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    for meter in meters:
        meter.measure(parameters)
    assert torch.equal(torch.rand(2), expected)
    for step in range(6):
        with torch.no_grad():
            for p in parameters.values():
                p.add_(torch.randn_like(p) * 0.01)
        found = [meter.measure(parameters) for meter in meters]
        assert found[0] == found[1]
        assert (found[0] is None) == (step < 2)


def test_nan_in_a_weight_is_nan_until_it_has_left_the_window() -> None:
    model = gpt2().to(torch.bfloat16)
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    meter = SpectralEdgeMeter(views, BACKEND, window_size=2)
    weight = parameters["transformer.h.0.mlp.c_fc.weight"]
    ratios = []
    for step in range(8):
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(1.01 + 0.1 * (step % 3))
            weight[0, 0] = math.nan if step == 3 else 0.5
        found = meter.measure(parameters)
        ratios.append(found.ratio if found else 0.0)
    assert [math.isnan(ratio) for ratio in ratios] == [False] * 3 + [True] * 3 + [False] * 2


def test_nothing_selected_is_nothing_measured() -> None:
    assert SpectralEdgeMeter((), BACKEND).measure({}) is None
