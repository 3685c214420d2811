"""The smoother: the right matrices move, by the right amount, and nothing else does."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_pss.config import SmoothingName
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Clip
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.smoother import smooth_matrices_
from hf_pss.records.events import MatrixChange

BACKEND = Backend()
# Relative to σ₁, against a full SVD in float64, worst over the matrices of the models below.
EDIT_TOLERANCE = 2e-6  # measured 1.0e-6
SIGMA_TOLERANCE = 1e-5  # measured 4.7e-6
ITERATED_SIGMA = 0.02  # measured 0.0073, relative to itself
ITERATED_RANK = 0.04  # measured 0.015
FROBENIUS_TOLERANCE = 4e-6  # measured 1.6e-6
BF16_TOLERANCE = 1e-3  # measured 3.8e-4


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=1,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=1,
            vocab_size=32,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral}


def sharpened(name: str) -> nn.Module:
    """Return a model whose matrices all have two singular values far above the others."""
    torch.manual_seed(5)
    model = MODELS[name]()
    for view in select_matrices(model).matrices:
        parameter = model.get_parameter(view.parameter_name)
        u, s, vh = torch.linalg.svd(view.read(parameter), full_matrices=False)
        s[..., :2] = s[..., :1] * torch.tensor([6.0, 5.99])
        view.write_(parameter, u @ (s.unsqueeze(-1) * vh))
    return model


def smooth(model: nn.Module, **options: Any) -> tuple[MatrixChange, ...]:
    return smooth_matrices_(
        select_matrices(model).matrices,
        named_parameters_canonical(model),
        BACKEND,
        options.pop("phi_for", lambda names: Clip()),
        **{"max_rank": 32, **options},
    )


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    views = select_matrices(model).matrices
    parts = [v.read(model.get_parameter(v.parameter_name)) for v in views]
    whole = [x.clone() for part in parts for x in part.reshape(-1, *part.shape[-2:])]
    return dict(zip(matrix_names(views), whole, strict=True))


def clipped64(matrix: Tensor) -> Tensor:
    """Clip in float64 by a full SVD: the dominant ⌊SR⌋ values become σ_{k+1}."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    k = int((s.square().sum() / s[0] ** 2).floor())
    s[:k] = s[k]
    return u @ (s.unsqueeze(-1) * vh)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_dominant_directions_move(name: str) -> None:
    model = sharpened(name)
    before = matrices_of(model)
    changes = {change.name: change for change in smooth(model)}
    assert set(changes) == set(before)
    for matrix_name, after in matrices_of(model).items():
        change, old = changes[matrix_name], before[matrix_name]
        assert change.status == "smoothed"
        sigma1 = torch.linalg.matrix_norm(old.double(), 2)
        error = torch.linalg.matrix_norm(after.double() - clipped64(old), 2) / sigma1
        assert error < EDIT_TOLERANCE
        assert change.sigma_before == pytest.approx(float(sigma1), rel=SIGMA_TOLERANCE)
        new_sigma1 = float(torch.linalg.matrix_norm(after.double(), 2))
        assert change.sigma_after == pytest.approx(new_sigma1, rel=SIGMA_TOLERANCE)
        assert new_sigma1 < 0.5 * sigma1  # and the comparison could have failed:
        assert torch.linalg.matrix_norm(old.double() - clipped64(old), 2) / sigma1 > 0.5


def test_the_record_of_a_fresh_wide_model_matches_its_weights() -> None:
    """Noise of width 256: the iteration stops short of Clip's level, and the record says so."""
    torch.manual_seed(0)
    model = gpt2(width=256)
    changes = {change.name: change for change in smooth(model)}
    for name, after in matrices_of(model).items():
        sigma = torch.linalg.svdvals(after.double())
        rank = float((sigma / sigma[0]).square().sum())
        assert changes[name].sigma_after == pytest.approx(float(sigma[0]), rel=ITERATED_SIGMA)
        assert changes[name].stable_rank_after == pytest.approx(rank, rel=ITERATED_RANK)


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_keeps_its_bits(name: str) -> None:
    model = sharpened(name)
    selected = {view.parameter_name for view in select_matrices(model).matrices}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    smooth(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == selected
    assert not any("emb" in n or "wte" in n or "lm_head" in n or "norm" in n for n in moved)
    assert not any("router" in n or "mlp.gate.weight" in n for n in moved)
    if name == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight  # tied, and still tied


def test_parts_of_a_fused_projection_move_apart() -> None:
    model = sharpened("gpt2")
    parameter = model.transformer.h[0].attn.c_attn.weight
    before = parameter.detach().clone()
    changes = smooth(model, names={"transformer.h.0.attn.c_attn.weight[k]"})
    assert [change.shape for change in changes] == [(16, 16)]
    assert not torch.equal(parameter[:, 16:32], before[:, 16:32])
    assert torch.equal(parameter[:, :16], before[:, :16])
    assert torch.equal(parameter[:, 32:], before[:, 32:])


def test_one_expert_of_a_stack_moves_alone() -> None:
    model = sharpened("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    (change,) = smooth(model, names={f"{name}[1]"})
    assert change.name == f"{name}[1]"
    same = [torch.equal(parameter[expert], before[expert]) for expert in range(3)]
    assert same == [True, False, True]


def test_bfloat16_weights_are_smoothed_and_stay_bfloat16() -> None:
    model = sharpened("llama").bfloat16()
    before = matrices_of(model)
    smooth(model)
    for name, after in matrices_of(model).items():
        assert after.dtype is torch.bfloat16
        wanted, sigma1 = clipped64(before[name]), torch.linalg.matrix_norm(before[name].double(), 2)
        assert torch.linalg.matrix_norm(after.double() - wanted, 2) / sigma1 < BF16_TOLERANCE


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_matrix_is_reported_and_not_written(bad: float) -> None:
    model = sharpened("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter[0, 0] = bad
    before = parameter.detach().clone()
    status = {change.name: change.status for change in smooth(model)}
    assert status.pop(name) == "non_finite"
    assert set(status.values()) == {"smoothed"}
    assert torch.equal(parameter.nan_to_num(), before.nan_to_num())


def test_a_zero_matrix_is_left_alone() -> None:
    model = sharpened("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    nn.init.zeros_(model.get_parameter(name))
    status = {change.name: change.status for change in smooth(model)}
    assert status[name] == "rank_deficient"
    assert not model.get_parameter(name).any()


def test_the_level_may_differ_from_matrix_to_matrix() -> None:
    seen: list[str] = []

    def phi_for(names: Any) -> Clip:
        seen.extend(names)
        return Clip()

    model = sharpened("gpt2")
    changes = smooth(model, phi_for=phi_for)
    assert seen == [change.name for change in changes]


def test_keep_frobenius_keeps_the_norm_and_still_flattens() -> None:
    model = sharpened("llama")
    before = matrices_of(model)
    changes = {change.name: change for change in smooth(model, keep_frobenius=True)}
    for name, after in matrices_of(model).items():
        norm = float(torch.linalg.matrix_norm(before[name].double()))
        assert float(torch.linalg.matrix_norm(after.double())) == pytest.approx(
            norm, rel=FROBENIUS_TOLERANCE
        )
        assert changes[name].stable_rank_after > changes[name].stable_rank_before


@pytest.mark.parametrize("phi", get_args(SmoothingName))
def test_every_smoothing_function_lowers_the_first_value(phi: str) -> None:
    model = sharpened("llama")
    changes = smooth(model, phi_for=lambda names: SMOOTHING_FUNCTIONS[phi]())
    assert {change.status for change in changes} == {"smoothed"}
    assert all(change.sigma_after < change.sigma_before for change in changes)
