"""The LoRA products that are found, their names, and the reasons for the other factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import llama, mixtral
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_pss import SelectionError, select_matrices
from hf_pss.models.selection import Selection

PATH = "base_model.model.model.layers"


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(r=2, lora_alpha=3, **{**targets, **options})
    return get_peft_model(model or llama(), config)


def short_names(selection: Selection) -> list[str]:
    """Names of the products in the first block."""
    start = f"{PATH}.0."
    return [v.name.removeprefix(start) for v in selection.adapters if v.name.startswith(start)]


def reasons(selection: Selection) -> dict[str, str]:
    return {e.parameter_name: e.reason for e in selection.exclusions}


def test_a_product_names_its_factors_its_base_and_its_scale() -> None:
    q_proj, down_proj, *_ = select_matrices(adapted()).adapters
    assert q_proj.name == f"{PATH}.0.self_attn.q_proj[default]"
    assert q_proj.left_name == f"{PATH}.0.self_attn.q_proj.lora_B.default.weight"
    assert q_proj.right_name == f"{PATH}.0.self_attn.q_proj.lora_A.default.weight"
    assert q_proj.base_name == f"{PATH}.0.self_attn.q_proj.base_layer.weight"
    assert q_proj.scaling == 1.5
    assert down_proj.shape == (16, 24)


class Wrapper(nn.Module):
    """Wrap a model as DDP and torch.compile do."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_wrappers_leave_no_trace_in_the_names(name: str) -> None:
    model = adapted()
    wrapped = select_matrices(Wrapper(name, model)).adapters
    assert wrapped
    assert wrapped == select_matrices(model).adapters


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["self_attn.q_proj[default]", "mlp.down_proj[default]"]),
        ({"roles": ["attention"]}, ["self_attn.q_proj[default]"]),
        (
            {"roles": ["attention"], "include": [r"down_proj\[default\]"]},
            ["self_attn.q_proj[default]", "mlp.down_proj[default]"],
        ),
        ({"include": ["lora_B"]}, ["self_attn.q_proj[default]", "mlp.down_proj[default]"]),
        ({"exclude": [r"q_proj\[default\]"]}, ["mlp.down_proj[default]"]),
        ({"exclude": ["q_proj.lora_A"]}, ["mlp.down_proj[default]"]),
        ({"exclude": ["down_proj.*weight$"]}, ["self_attn.q_proj[default]"]),
    ],
)
def test_roles_and_patterns_apply_to_products(options: dict[str, Any], found: list[str]) -> None:
    selection = select_matrices(adapted(), **options)
    assert short_names(selection) == found
    assert not selection.matrices


def test_every_factor_is_in_a_product_or_has_a_reason() -> None:
    model = adapted(target_modules=["q_proj", "lm_head", "embed_tokens"], use_dora=True)
    selection = select_matrices(model, exclude=[r"layers\.1.*q_proj"])
    why = reasons(selection)
    assert short_names(selection) == ["self_attn.q_proj[default]"]
    assert why[f"{PATH}.1.self_attn.q_proj[default]"].startswith("excluded by")
    assert why["base_model.model.lm_head[default]"] == "outside the repeated blocks"
    named = {name for view in selection.adapters for name in view.names}
    for name, parameter in model.named_parameters():
        product = f"{name.partition('.lora_')[0]}[default]"
        assert not parameter.requires_grad or {name, product} & (named | why.keys()), name


def test_adapters_that_do_not_train_have_a_reason() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_parameter(f"{PATH}.0.mlp.down_proj.lora_A.default.weight").requires_grad_(False)
    selection = select_matrices(model)
    why = reasons(selection)
    assert short_names(selection) == ["self_attn.q_proj[default]"]
    assert why[f"{PATH}.0.self_attn.q_proj.lora_A.other.weight"] == (
        "LoRA factor: adapter 'other' is not active"
    )
    for side in "AB":
        name = f"{PATH}.0.mlp.down_proj.lora_{side}.default.weight"
        assert why[name] == "LoRA factor: frozen, or its partner is"


def test_several_active_adapters_are_products_of_their_own() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert short_names(select_matrices(model)) == [
        "self_attn.q_proj[default]",
        "self_attn.q_proj[other]",
        "mlp.down_proj[default]",
    ]


def test_merged_adapters_are_left_out() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(SelectionError, match="8 × LoRA factor: merged into the base weight"):
        select_matrices(model)


def test_tuners_without_two_matrices_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Linear(4, 4))
            self.layers = nn.ModuleList([block])

    selection = select_matrices(adapted(Net(), target_modules=["0.0", "0.1"]))
    assert [view.name for view in selection.adapters] == ["base_model.model.layers.0.1[default]"]
    convolution = "base_model.model.layers.0.0.lora_B.default.weight"
    assert reasons(selection)[convolution] == "LoRA factor of a convolution"


def test_experts_are_named_after_their_parameter() -> None:
    model = adapted(
        mixtral(2),
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    assert sorted(short_names(select_matrices(model))) == [
        "mlp.experts.down_proj[default][0]",
        "mlp.experts.down_proj[default][1]",
        "mlp.experts.gate_up_proj[default][0]",
        "mlp.experts.gate_up_proj[default][1]",
    ]
    without = select_matrices(model, exclude=[r"down_proj\[default\]\[1\]"])
    assert len(short_names(without)) == 3


def test_an_include_that_an_exclude_undoes_is_refused() -> None:
    with pytest.raises(SelectionError, match="an exclude pattern wins over it"):
        select_matrices(adapted(), include=["q_proj.lora_B"], exclude=["q_proj"])
