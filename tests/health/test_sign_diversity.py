"""Spectral alignment and the diversity of its signs."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, llama, token_rows
from torch import Tensor, nn

from hf_pss.health.probe_meters import SignDiversityMeter
from hf_pss.health.representations import sign_diversity, spectral_alignment
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
COSINE_TOLERANCE = 3e-7  # 1.0e-7
DIVERSITY_TOLERANCE = 6e-8  # 2.0e-8


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_alignment_is_the_cosine_at_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    x, v = torch.randn(50, 12) * scale, nn.functional.normalize(torch.randn(12), dim=0)
    exact = nn.functional.cosine_similarity(x.double() / scale, v.double(), dim=-1)
    found = spectral_alignment(x, v).double()
    assert float((found - exact).abs().max()) <= COSINE_TOLERANCE
    several = spectral_alignment(x, torch.stack([v, -v], dim=-1)).double()
    assert float((several - torch.stack([exact, -exact], -1)).abs().max()) <= COSINE_TOLERANCE


def test_a_collapsed_representation_has_none_and_a_balanced_one_has_all() -> None:
    v = torch.eye(8)[0]
    direction = torch.randn(8)
    collapsed = direction * torch.rand(100, 1).add(0.1)
    assert float(sign_diversity(spectral_alignment(collapsed, v))) == 0
    balanced = torch.cat([collapsed, -collapsed])
    assert float(sign_diversity(spectral_alignment(balanced, v))) == 1


def test_tokens_without_a_sign_do_not_count_and_broken_ones_break_it() -> None:
    v = torch.eye(4)[0]
    x = torch.zeros(6, 4)
    x[0, 0], x[1, 0] = 1.0, -1.0
    assert float(sign_diversity(spectral_alignment(x, v))) == 1
    assert math.isnan(float(sign_diversity(spectral_alignment(x[2:], v))))
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[3, 2] = bad
        assert math.isnan(float(sign_diversity(spectral_alignment(y, v))))


def directions_of(model: nn.Module) -> dict[str, Tensor]:
    parameters = named_parameters_canonical(model)
    return {
        view.name: torch.linalg.svd(view.read(parameters[view.parameter_name])).Vh[0]
        for view in select_matrices(model).matrices
    }


@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_matrix_of_a_model_is_measured_only_while_armed(make: type) -> None:
    torch.manual_seed(2)
    model = make().eval()  # no dropout: two passes must agree
    views = select_matrices(model).matrices
    meter = SignDiversityMeter(model, views, BACKEND)
    tokens = torch.stack([row["input_ids"] for row in token_rows(4)])
    directions = directions_of(model)
    inputs: dict[str, Tensor] = {}
    owners = {view.parameter_name.removesuffix(".weight") for view in views}
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: inputs.update({name: x[0]}))
        for name, module in model.named_modules()
        if name in owners
    ]
    plain = model(tokens).logits
    meter.arm(directions)
    heard = model(tokens).logits
    measured = meter.read()
    assert torch.equal(plain, heard)
    assert sorted(measured) == sorted(view.name for view in views)
    for view in views:
        x = inputs[view.parameter_name.removesuffix(".weight")].detach().flatten(0, -2)
        signs = (x.double() @ directions[view.name].double()).sign()
        assert measured[view.name] == pytest.approx(
            1 - abs(float(signs.mean())), abs=DIVERSITY_TOLERANCE
        )
    for handle in handles:
        handle.remove()
    model(tokens)
    assert meter.read() == {}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_micro_batches_add_up_until_the_next_arming() -> None:
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
        1,
        enable_nested_tensor=False,
    )
    view = next(
        v for v in select_matrices(layer).matrices if v.parameter_name == "layers.0.linear1.weight"
    )
    meter = SignDiversityMeter(layer, (view,), BACKEND)
    linear = layer.layers[0].linear1
    v = torch.eye(4)[0]
    meter.arm({view.name: v})
    linear(v.expand(3, 4))
    linear(-v.expand(1, 4))
    assert meter.read() == {view.name: 0.5}
    meter.arm({view.name: v})
    linear(v.expand(3, 4))
    meter.arm({view.name: v})
    linear(-v.expand(1, 4))
    assert meter.read() == {view.name: 0.0}
    meter.arm({})
    linear(v)
    assert meter.read() == {}
