"""Look at all matrices cheaply, and cap those below their floor with what was seen."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor, nn

from hf_pss.distributed import OneProcess
from hf_pss.linalg import noise_stable_rank
from hf_pss.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.smoother import Look, cap_matrices_, look_at_matrices

BACKEND = OneProcess()
# Relative, against float64 SVDs, worst over the matrices of both models.
SPIKED_RANK = 9e-7  # 3.2e-7, the stable rank that a look reads off matrices with two spikes
NOISE_RANK_ABOVE = 0.1  # 0.034, and how far above the true one off fresh matrices
FLOOR_BAND = 1.7e-5  # 5.7e-6, how far below its floor a capped matrix ends
THOROUGH_BAND = 1e-4  # 2.0e-5, the same, of a Krylov space that has not converged to the last value
CONTRACTION = 1.5e-8  # 5.2e-9, relative to σ₁

MODELS = {"gpt2": lambda: gpt2(num_layers=2, width=32), "llama": llama}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(5)
    made: nn.Module = MODELS[request.param]()
    return made


def parts(model: nn.Module) -> tuple[tuple[MatrixView, ...], dict[str, nn.Parameter]]:
    return select_matrices(model).matrices, named_parameters_canonical(model)


@torch.no_grad()
def sharpen_(model: nn.Module) -> None:
    """Give every matrix two singular values far above the others."""
    views, parameters = parts(model)
    for view in views:
        parameter = parameters[view.parameter_name]
        u, s, vh = torch.linalg.svd(view.read(parameter), full_matrices=False)
        s[..., :2] = s[..., :1] * torch.tensor([12.0, 9.0])
        view.write_(parameter, u @ (s.unsqueeze(-1) * vh))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    views, parameters = parts(model)
    read = {view.name: view.read(parameters[view.parameter_name]) for view in views}
    return {name: torch.linalg.svdvals(matrix.detach().double()) for name, matrix in read.items()}


def rank_of(sigma: Tensor) -> float:
    return float(sigma.square().sum() / sigma[0].square())


def looked(model: nn.Module) -> tuple[tuple[Look, ...], dict[str, float]]:
    return look_at_matrices(*parts(model), BACKEND)


def floors_of(model: nn.Module, ratio: float) -> dict[str, float]:
    return {v.name: max(1.0, ratio * noise_stable_rank(*v.shape[-2:])) for v in parts(model)[0]}


def test_a_look_reads_the_stable_rank_of_collapsed_matrices(model: nn.Module) -> None:
    sharpen_(model)
    _, ranks = looked(model)
    values = values_of(model)
    assert ranks.keys() == values.keys()
    for name, rank in ranks.items():
        assert rank == pytest.approx(rank_of(values[name]), rel=SPIKED_RANK)


def test_a_look_at_fresh_matrices_is_high_by_its_band_and_never_low(model: nn.Module) -> None:
    _, ranks = looked(model)
    for name, sigma in values_of(model).items():
        excess = ranks[name] / rank_of(sigma) - 1
        assert -SPIKED_RANK <= excess <= NOISE_RANK_ABOVE


def test_a_look_keeps_no_second_copy_of_the_model_and_changes_nothing(model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    looks, _ = looked(model)
    held = sum(t.numel() for look in looks for t in (look.triplets.u, look.triplets.v))
    assert held <= 16 * sum(sum(v.shape[-2:]) for v in parts(model)[0])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_capped_matrices_reach_their_floors_and_no_value_rises(
    model: nn.Module, ratio: float
) -> None:
    sharpen_(model)
    before = values_of(model)
    looks, ranks = looked(model)
    floors = floors_of(model, ratio)
    low = [name for name, rank in ranks.items() if rank < floors[name]]
    assert low
    changes = cap_matrices_(looks, floors, low, *parts(model), BACKEND, max_rank=32)
    assert sorted(change.name for change in changes) == sorted(low)
    assert all(change.status == "smoothed" for change in changes)
    after = values_of(model)
    for name, sigma in after.items():
        if name in low:
            assert rank_of(sigma) >= floors[name] * (1 - FLOOR_BAND)
            assert ((sigma - before[name]) / before[name][0]).max() <= CONTRACTION
        else:
            assert torch.equal(sigma, before[name])


def test_what_is_put_on_record_is_what_happened(model: nn.Module) -> None:
    sharpen_(model)
    before = values_of(model)
    looks, ranks = looked(model)
    floors = floors_of(model, 0.5)
    changes = cap_matrices_(looks, floors, list(ranks), *parts(model), BACKEND, max_rank=32)
    after = values_of(model)
    for change in changes:
        assert change.sigma_before == pytest.approx(float(before[change.name][0]), rel=SPIKED_RANK)
        assert change.sigma_after == pytest.approx(float(after[change.name][0]), rel=FLOOR_BAND)
        told = change.stable_rank_after
        assert told == pytest.approx(rank_of(after[change.name]), rel=2 * FLOOR_BAND)


def test_matrices_that_are_not_named_stay_bit_for_bit(model: nn.Module) -> None:
    sharpen_(model)
    looks, ranks = looked(model)
    chosen = next(iter(ranks))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cap_matrices_(looks, floors_of(model, 0.5), [chosen], *parts(model), BACKEND, max_rank=32)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]
    views = {view.name: view.parameter_name for view in parts(model)[0]}
    assert changed == [views[chosen]]


def test_the_frobenius_norm_can_be_kept(model: nn.Module) -> None:
    sharpen_(model)
    before = values_of(model)
    looks, ranks = looked(model)
    cap_matrices_(
        looks,
        floors_of(model, 0.5),
        list(ranks),
        *parts(model),
        BACKEND,
        keep_frobenius=True,
        max_rank=32,
    )
    for name, sigma in values_of(model).items():
        assert float(sigma.norm() / before[name].norm()) == pytest.approx(1, rel=SPIKED_RANK)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_rank_and_is_not_touched(
    model: nn.Module, bad: float
) -> None:
    sharpen_(model)
    views, parameters = parts(model)
    with torch.no_grad():
        broken = parameters[views[0].parameter_name]
        broken.view(-1)[3] = bad
    before = broken.detach().clone()
    looks, ranks = looked(model)
    # A fused parameter holds several matrices; the entry lies in one of them.
    assert sum(math.isnan(rank) for rank in ranks.values()) == 1
    floors = floors_of(model, 0.5)
    low = [name for name, rank in ranks.items() if rank < floors[name]]  # NaN is below nothing
    cap_matrices_(looks, floors, low, *parts(model), BACKEND, max_rank=32)
    nan = [name for name, rank in ranks.items() if math.isnan(rank)]
    view = next(v for v in views if v.name == nan[0])
    kept = view.read(broken.detach())
    assert torch.equal(kept.nan_to_num(), view.read(before).nan_to_num())
    for name, rank in looked(model)[1].items():
        assert name in nan or rank >= floors[name] * (1 - FLOOR_BAND)


def test_zero_matrices_are_left_alone(model: nn.Module) -> None:
    with torch.no_grad():
        for view in parts(model)[0]:
            parts(model)[1][view.parameter_name].zero_()
    looks, ranks = looked(model)
    cap_matrices_(looks, floors_of(model, 0.5), list(ranks), *parts(model), BACKEND, max_rank=32)
    for parameter in parts(model)[1].values():
        assert parameter.isfinite().all()
    assert not any(float(sigma[0]) for sigma in values_of(model).values())


@pytest.mark.parametrize("num_spikes", [8, 20])
@torch.no_grad()
def test_more_strong_directions_than_a_look_has_triplets(num_spikes: int) -> None:
    """Eight equal spikes leave a look of eight triplets nothing to see of what lies behind."""
    generator = torch.Generator().manual_seed(0)
    model = gpt2(num_layers=1, width=128)
    views, parameters = parts(model)
    view = next(view for view in views if view.name.endswith("attn.c_proj.weight"))
    parameter = parameters[view.parameter_name]
    u, v = (torch.linalg.qr(torch.randn(128, num_spikes, generator=generator)).Q for _ in range(2))
    parameter.copy_(0.02 * torch.randn(128, 128, generator=generator) + 5 * u @ v.mT)
    floors = floors_of(model, 1.0)
    looks, _ = looked(model)
    (change,) = cap_matrices_(looks, floors, [view.name], *parts(model), BACKEND, max_rank=32)
    assert change.status == "smoothed"
    sigma = values_of(model)[view.name]
    assert rank_of(sigma) == pytest.approx(floors[view.name], rel=THOROUGH_BAND)


@torch.no_grad()
def test_no_more_values_move_than_were_allowed() -> None:
    model = gpt2(num_layers=1, width=128)
    sharpen_(model)
    looks, ranks = looked(model)
    before = values_of(model)
    floors = floors_of(model, 1.0)
    changes = cap_matrices_(looks, floors, list(ranks), *parts(model), BACKEND, max_rank=1)
    assert {change.status for change in changes} == {"truncated"}
    for name, sigma in values_of(model).items():
        assert sigma[0] == pytest.approx(float(before[name][1]), rel=1e-5)
