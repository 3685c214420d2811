"""LoRA adapters of PEFT: found, read, smoothed, in a model and in a training run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    controller_of,
    events_of,
    gpt2,
    llama,
    make_trainer,
    mixtral,
    steps_of,
    token_rows,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_pss import PSSConfig, PSSController, PSSTrainer, select_matrices
from hf_pss.linalg import Clip, smooth_product, stable_rank
from hf_pss.models.adapters import frozen_collapses, measure_adapter_spectra, smooth_adapters_
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import AdapterView, named_parameters_canonical

BACKEND = Backend()
# Of s·B·A against the SVD of the product that PEFT itself materialises; relative to σ₁.
PRODUCT = 1e-5  # 1.1e-6
RANK = 1e-5  # 1.6e-6, relative


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": (lambda: gpt2(2), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "DoRA": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "rsLoRA": (llama, {"target_modules": ["o_proj"], "use_rslora": True}),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


def adapted(name: str, **options: Any) -> nn.Module:
    """A model whose adapters are trained: B is not zero any more."""
    torch.manual_seed(1)
    build, where = MODELS[name]
    model = get_peft_model(build(), LoraConfig(r=4, lora_alpha=6, **{**where, **options}))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return model


def stable_ranks(
    views: Sequence[AdapterView], parameters: dict[str, nn.Parameter]
) -> dict[str, float]:
    spectra = measure_adapter_spectra(views, parameters, BACKEND)
    return {name: spectrum.stable_rank for name, spectrum in spectra.items()}


def deltas(model: nn.Module) -> list[Tensor]:
    """What PEFT adds to the base weights, one matrix an expert."""
    found = []
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            found += [delta] if delta.ndim == 2 else list(delta)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_stable_ranks_are_those_of_pefts_own_product(name: str) -> None:
    model = adapted(name)
    views = select_matrices(model).adapters
    dense = deltas(model)
    assert len(views) == len(dense)
    ranks = stable_ranks(views, named_parameters_canonical(model))
    for (view, rank), delta in zip(zip(views, ranks.values(), strict=True), dense, strict=True):
        assert sorted(view.shape) == sorted(delta.shape)
        assert rank == pytest.approx(float(stable_rank(delta)), rel=RANK)


@pytest.mark.parametrize("name", list(MODELS))
def test_smoothing_is_that_of_pefts_own_product(name: str) -> None:
    model = adapted(name)
    before = deltas(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    views = select_matrices(model).adapters
    changes = smooth_adapters_(
        views, named_parameters_canonical(model), BACKEND, lambda names: Clip(), max_rank=32
    )
    assert {change.status for change in changes} == {"smoothed"}
    for change, old, new in zip(changes, before, deltas(model), strict=True):
        u, sigma, vh = torch.linalg.svd(old, full_matrices=False)
        level = sigma[change.rank]
        expected = (u * sigma.clamp(max=level)) @ vh
        assert float((new - expected).norm() / sigma[0]) <= PRODUCT
        assert change.sigma_after == pytest.approx(float(level), rel=RANK)
    for key, parameter in model.named_parameters():
        if key in frozen:
            assert torch.equal(parameter, frozen[key])


def test_only_the_active_adapter_is_selected() -> None:
    model = adapted("Linear")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    names = {view.name for view in select_matrices(model).adapters}
    assert names
    assert all(name.endswith("[default]") for name in names)
    model.set_adapter("other")
    assert all(view.name.endswith("[other]") for view in select_matrices(model).adapters)


def test_a_fully_trained_module_is_an_ordinary_matrix() -> None:
    model = adapted("Linear", modules_to_save=["gate_proj"])
    selection = select_matrices(model)
    assert [m.name for m in selection.matrices if "gate_proj" in m.name]
    assert all("base_layer" not in m.name for m in selection.matrices)
    assert selection.adapters
    assert "product of LoRA's factors" in selection.table()


def test_frozen_adapters_are_not_selected() -> None:
    model = adapted("Linear")
    model.requires_grad_(False)
    pss = PSSController(model, speaks=False)
    assert not pss.selection.adapters
    assert "frozen, inactive" in (pss.caution() or "")


def test_a_pattern_leaves_adapters_out() -> None:
    views = select_matrices(adapted("Linear"), exclude=["q_proj"]).adapters
    assert views
    assert not any("q_proj" in view.name for view in views)


def test_a_product_that_is_zero_or_broken_is_left_alone() -> None:
    model = adapted("Linear")
    parameters = named_parameters_canonical(model)
    zero, broken, *_ = select_matrices(model).adapters
    parameters[zero.left_name].data.zero_()
    parameters[broken.right_name].data[0, 0] = float("nan")
    ranks = stable_ranks([zero, broken], parameters)
    assert ranks[zero.name] == 0
    assert ranks[broken.name] != ranks[broken.name]
    changes = smooth_adapters_(
        [zero, broken], parameters, BACKEND, lambda names: Clip(), max_rank=32
    )
    assert [change.status for change in changes] == ["rank_deficient", "non_finite"]


class SpikedTrainer(PSSTrainer):
    """One batch has a loss 1,000 times too large; clipping is off, as where it hurts."""

    spiked_step: int | None = None

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        is_spiked = model.training and self.state.global_step + 1 == self.spiked_step
        return loss * 1000 if is_spiked else loss


@pytest.mark.parametrize("backend_model", ["Linear", "Conv1D"])
def test_a_spike_is_noticed_and_the_products_smoothed(
    backend_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path,
        PSSConfig.preset("paper", threshold_ratio=2.0, calibration_steps=2),
        trainer_class=SpikedTrainer,
        model=adapted(backend_model),
        rows=token_rows(),
        save_strategy="no",
    )
    trainer.spiked_step = 5
    trainer.train()
    assert steps_of(events_of(tmp_path)) == [5]
    (event,) = [e for e in events_of(tmp_path) if e["kind"] == "intervention"]
    assert {m["status"] for m in event["matrices"]} == {"smoothed"}
    assert all(m["name"].endswith("[default]") for m in event["matrices"])
    assert controller_of(trainer).selection.adapters


def test_a_collapsed_frozen_base_causes_a_warning_and_is_not_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted("Linear")
    base = next(p for n, p in model.named_parameters() if "q_proj.base_layer.weight" in n)
    base.data.addr_(torch.ones(16), torch.ones(16), alpha=5.0)
    before = base.clone()
    pss = PSSController(model, PSSConfig.preset("paper"))
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        pss.smooth_now()
        pss.smooth_now()
    (line,) = [r.message for r in caplog.records if "frozen base" in r.message]
    assert "q_proj.base_layer.weight" in line
    assert "cannot remove" in line
    assert torch.equal(base, before)


def test_the_floor_warns_that_it_ignores_adapters(caplog: pytest.LogCaptureFixture) -> None:
    floor = PSSConfig.preset("floor")
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        PSSController(adapted("Linear", modules_to_save=["gate_proj"]), floor)
        assert "does not watch the 4 LoRA products" in caplog.text
        assert "Nothing else is left to watch" not in caplog.text
        PSSController(adapted("Linear"), floor)
    assert "Nothing else is left to watch" in caplog.text


def test_a_packed_base_is_passed_over() -> None:
    """bitsandbytes may store four-bit weights as floating-point numbers, in one column."""
    view = AdapterView("m[default]", "b", "a", "base", 1.0, (64, 32))
    stored = {
        "packed": torch.ones(64 * 32 // 4, 1),
        "whole": torch.ones(64, 32),
        "inputs first": torch.ones(32, 64),
    }
    found = {
        name: frozen_collapses([view], {"base": nn.Parameter(weight)}, BACKEND)
        for name, weight in stored.items()
    }
    assert found["packed"] == {}
    one = {"base": pytest.approx(1.0, abs=RANK)}
    assert found["whole"] == found["inputs first"] == one


def test_the_bases_of_experts_are_measured() -> None:
    model = adapted("experts")
    parameters = named_parameters_canonical(model)
    (name,) = [
        name for name in parameters if name.endswith("experts.base_layer.base_layer.down_proj")
    ]
    with torch.no_grad():
        parameters[name][1] = 1.0
    views = select_matrices(model).adapters
    assert frozen_collapses(views, parameters, BACKEND) == {
        f"{name}[1]": pytest.approx(1.0, abs=RANK)
    }


class Mastered(Backend):
    """As ZeRO: what the forward reads is a bf16 copy of what the optimizer updates."""

    def __init__(self, masters: dict[int, Tensor]) -> None:
        object.__setattr__(self, "masters", masters)

    def master(self, parameter: Tensor) -> Tensor:
        return self.masters[id(parameter)]  # type: ignore[attr-defined, no-any-return]

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        self.masters[id(parameter)].copy_(full)  # type: ignore[attr-defined]
        parameter.data.copy_(full)


def test_factors_are_smoothed_as_the_optimizer_has_them() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 8), torch.randn(8, 64)
    left[:, 0] *= 20
    parameters = {
        "b": nn.Parameter(left.bfloat16()),
        "a": nn.Parameter(right.bfloat16()),
    }
    masters = {"b": left.clone(), "a": right.clone()}
    backend = Mastered({id(parameters[name]): masters[name] for name in parameters})
    view = AdapterView("m[default]", "b", "a", None, 1.0, (64, 64))
    smooth_adapters_([view], parameters, backend, lambda names: Clip(), max_rank=32)
    expected = smooth_product(left, right, Clip())
    # Equal to the bit; through bf16 they were 2.6e-3 off.
    assert torch.equal(masters["b"], expected.left)
    assert torch.equal(masters["a"], expected.right)
    assert torch.equal(parameters["b"], expected.left.bfloat16())
