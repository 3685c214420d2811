"""Health metrics against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_pss.linalg import quick_stable_rank
from hf_pss.models.batching import matrix_names, measure_each
from hf_pss.models.distributed import Backend
from hf_pss.models.measurements import (
    UpdateMeter,
    gradient_norms,
    measure_matrix_grad_norms,
    nonfinite_gradients,
)
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices

BACKEND = Backend()
# A few products with a narrow block find σ₁ of a random matrix from below: 1.1e-3.
STABLE_RANK_TOLERANCE = 3e-3
NORM_TOLERANCE = 1.2e-6  # 4.5e-7


def prepared(
    make: type = gpt2,
) -> tuple[PreTrainedModel, tuple[MatrixView, ...], dict[str, nn.Parameter]]:
    torch.manual_seed(2)
    model = make()
    rows = token_rows(4)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model(**batch).loss.backward()
    return model, select_matrices(model).matrices, named_parameters_canonical(model)


def matrices(views: tuple[MatrixView, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each 2-D matrix by name, in float64."""
    return {view.name: view.read(tensors[view.parameter_name]).double() for view in views}


@pytest.mark.parametrize("make", [gpt2, llama])
def test_stable_ranks_are_those_of_an_svd(make: type) -> None:
    _, views, parameters = prepared(make)
    measured = measure_each(views, parameters, BACKEND, quick_stable_rank)
    assert tuple(sorted(measured)) == tuple(sorted(matrix_names(views)))
    for name, matrix in matrices(views, parameters).items():
        sigma = torch.linalg.svdvals(matrix)
        exact = float(sigma.square().sum() / sigma[0] ** 2)
        assert measured[name] == pytest.approx(exact, rel=STABLE_RANK_TOLERANCE)


def test_a_broken_matrix_has_no_stable_rank_and_harms_no_other() -> None:
    _, views, parameters = prepared()
    before = measure_each(views, parameters, BACKEND, quick_stable_rank)
    with torch.no_grad():
        parameters["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.nan
        parameters["transformer.h.0.mlp.c_proj.weight"].zero_()
    after = measure_each(views, parameters, BACKEND, quick_stable_rank)
    assert math.isnan(after.pop("transformer.h.0.mlp.c_fc.weight"))
    assert after.pop("transformer.h.0.mlp.c_proj.weight") == 0
    assert after == {name: before[name] for name in after}


def test_nothing_selected_is_nothing_measured() -> None:
    assert measure_each((), {}, BACKEND, quick_stable_rank) == {}
    assert measure_matrix_grad_norms((), {}, BACKEND, 1.0) == {}


def test_measuring_changes_no_weight() -> None:
    model, views, parameters = prepared()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    measure_each(views, parameters, BACKEND, quick_stable_rank)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("factor", [1.0, 1e-3, 64.0], ids=["as-is", "clipped", "scaled"])
def test_matrix_gradient_norms_are_those_before_clipping(factor: float) -> None:
    model, views, parameters = prepared()
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    total = float(nn.utils.get_total_norm([g.double() for g in grads.values()]))
    for p in model.parameters():
        p.grad.mul_(factor)
    measured = measure_matrix_grad_norms(views, parameters, BACKEND, total)
    for name, matrix in matrices(views, grads).items():
        exact = float(torch.linalg.matrix_norm(matrix))
        assert measured[name] == pytest.approx(exact, rel=NORM_TOLERANCE)


def test_matrices_without_a_gradient_are_left_out_and_zero_gradients_are_zero() -> None:
    model, views, parameters = prepared()
    parameters["transformer.h.0.mlp.c_fc.weight"].grad = None
    measured = measure_matrix_grad_norms(views, parameters, BACKEND, 1.0)
    assert set(matrix_names(views)) - set(measured) == {"transformer.h.0.mlp.c_fc.weight"}
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    assert set(measure_matrix_grad_norms(views, parameters, BACKEND, 0.0).values()) == {0.0}


@pytest.mark.parametrize(("dtype", "entry"), [(torch.float16, 3e4), (torch.bfloat16, 1.0)])
def test_norms_of_half_gradients_are_summed_in_float32(dtype: torch.dtype, entry: float) -> None:
    """A sum of squares overflows in fp16 at 65,504, and has three digits in bf16."""
    model = gpt2().to(dtype)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    for p in parameters.values():
        p.grad = torch.full_like(p, entry)
    total = math.sqrt(sum(p.numel() for p in parameters.values()))
    measured = measure_matrix_grad_norms(views, parameters, BACKEND, total)
    for view in views:
        exact = math.sqrt(math.prod(view.shape))
        assert measured[view.name] == pytest.approx(exact, rel=NORM_TOLERANCE)
    assert nonfinite_gradients(gradient_norms(parameters.items(), BACKEND), BACKEND) == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_may_lie_on_several_devices() -> None:
    model, views, parameters = prepared()
    before = measure_matrix_grad_norms(views, parameters, BACKEND, 1.0)
    grads = {name: p.grad for name, p in parameters.items()}
    model.transformer.h[0].cuda()
    for name, p in parameters.items():
        p.grad = grads[name].to(p.device)
    after = measure_matrix_grad_norms(views, parameters, BACKEND, 1.0)
    assert after == pytest.approx(before, rel=NORM_TOLERANCE)


def test_the_probe_names_the_first_bad_parameters_in_the_models_order() -> None:
    _, _, parameters = prepared()
    names = list(parameters)
    assert nonfinite_gradients(gradient_norms(parameters.items(), BACKEND), BACKEND) == ()
    for name in (names[9], names[2], names[5], names[7]):
        parameters[name].grad.view(-1)[-1] = math.inf
    assert nonfinite_gradients(gradient_norms(parameters.items(), BACKEND), BACKEND) == (
        names[2],
        names[5],
        names[7],
        names[9],
    )


def test_the_probe_remembers_what_clipping_spreads() -> None:
    _, _, parameters = prepared()
    names = list(parameters)
    parameters[names[4]].grad.view(-1)[0] = math.nan
    probe = gradient_norms(parameters.items(), BACKEND)
    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    assert nonfinite_gradients(probe, BACKEND) == (names[4],)
    assert nonfinite_gradients(gradient_norms(parameters.items(), BACKEND), BACKEND) == tuple(names)


def test_the_probe_of_a_model_without_gradients_is_empty() -> None:
    assert nonfinite_gradients(gradient_norms(gpt2().named_parameters(), BACKEND), BACKEND) == ()


def test_the_update_norm_is_that_of_the_selected_parameters() -> None:
    _, views, parameters = prepared()
    meter = UpdateMeter(sorted({view.parameter_name for view in views}), BACKEND)
    meter.start(parameters)
    selected = sorted({view.parameter_name for view in views})
    torch.manual_seed(0)
    changes = {name: torch.randn_like(p) for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.add_(changes[name])
    exact = math.sqrt(sum(float(changes[name].double().square().sum()) for name in selected))
    assert float(meter.stop(parameters)) == pytest.approx(exact, rel=NORM_TOLERANCE)
