"""The hooks of a training step against the same numbers by hand, and their harmlessness."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from armed_meter import armed, hooks_of
from helpers import differences, gpt2, history, llama, make_trainer, train, weights_of
from torch import Tensor
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from hf_pss import PSSCallback, PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.health.meter import blocks_of
from hf_pss.health.representations import (
    attention_logit_bound,
    sign_diversity,
    spectral_alignment,
    token_cosine,
)
from hf_pss.models.selection import named_parameters_canonical, select_matrices

EXACT_TOLERANCE = 1e-5  # 1.2e-7: other shapes of products
DIRECTION_TOLERANCE = 1e-3  # 3.8e-4 on matrices with σ₂ near σ₁, followed from a cold start
KINDS = pytest.mark.parametrize("build", [lambda: gpt2(num_layers=2), llama])


@KINDS
def test_a_step_is_measured_as_by_hand_and_its_output_is_the_same(build: Any) -> None:
    torch.manual_seed(0)
    model = build().train()
    tokens = torch.randint(1, 48, (4, 8))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    named = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    torch.manual_seed(1)
    plain = model(**named, output_hidden_states=True)
    meter, directions = armed(model)
    torch.manual_seed(1)
    seen = model(**named)
    assert torch.equal(plain.logits, seen.logits)
    seen.loss.backward()
    parameters = named_parameters_canonical(model)
    found = meter.read(parameters)
    assert hooks_of(model) == 0
    selection = select_matrices(model)
    first = blocks_of(selection)[0]
    # Hidden states are of the embedding, then of each block.
    by_hand = token_cosine(plain.hidden_states[1][mask.bool()])
    assert found["token_cosine"][first] == pytest.approx(float(by_hand), abs=EXACT_TOLERANCE)
    assert found["gram_log_det_lower"][first] <= found["gram_log_det"][first] + EXACT_TOLERANCE
    assert set(found["sign_diversity"]) == {view.name for view in selection.matrices}
    assert all(0 <= x <= 1 for x in found["sign_diversity"].values())
    assert all(x > 0 for x in found["attention_logit_bound"].values())
    for view in selection.matrices:
        _, _, vh = torch.linalg.svd(view.read(parameters[view.parameter_name]))
        assert float((vh[0] @ directions[view.name]).abs()) >= 1 - DIRECTION_TOLERANCE


def test_signs_and_bound_are_those_of_the_layers_inputs() -> None:
    torch.manual_seed(0)
    model = gpt2().train()
    meter, directions = armed(model)
    inputs: list[Tensor] = []
    attention = model.transformer.h[0].attn
    handle = attention.c_attn.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    model(torch.randint(0, 48, (4, 8)))
    handle.remove()
    parameters = named_parameters_canonical(model)
    found = meter.read(parameters)
    name = "transformer.h.0.attn.c_attn.weight[q]"
    x = inputs[0].flatten(0, 1)
    by_hand = sign_diversity(spectral_alignment(x, directions[name]))
    assert found["sign_diversity"][name] == float(by_hand)
    query, key = attention.c_attn.weight.mT[:32].chunk(2)
    q_bias, k_bias = attention.c_attn.bias[:32].chunk(2)
    bound = attention_logit_bound(
        query, key, x.norm(dim=-1).max(), num_heads=2, query_bias=q_bias, key_bias=k_bias
    )
    assert found["attention_logit_bound"]["transformer.h.0.attn"] == pytest.approx(
        float(bound.detach().max()), rel=EXACT_TOLERANCE
    )


def neo() -> PreTrainedModel:
    names = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 48}
    return GPTNeoForCausalLM(GPTNeoConfig(**names, attention_types=[[["global", "local"], 1]]))


def mpt(scale: float | None) -> PreTrainedModel:
    config = MptConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=48, max_seq_len=8)
    config.attn_config.softmax_scale = scale
    return MptForCausalLM(config)


def granite() -> PreTrainedModel:
    config = GraniteConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 48},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    model = GraniteForCausalLM(config)
    model.model.layers[0].self_attn.scaling = 2  # as older releases read it from a configuration
    return model


def test_an_unknown_scale_gives_no_bound() -> None:
    """GPT-Neo does not scale q·k, and its module has no number for the scale."""
    model = neo().train()
    meter, _ = armed(model)
    model(torch.randint(0, 48, (4, 8)))
    found = meter.read(named_parameters_canonical(model))
    assert "attention_logit_bound" not in found
    assert found["token_cosine"]


@pytest.mark.parametrize(
    ("build", "scale"),
    [(lambda: mpt(None), 8**-0.5), (lambda: mpt(3.0), 3.0), (granite, 2.0)],
)
def test_the_bound_has_the_modules_own_scale(build: Any, scale: float) -> None:
    torch.manual_seed(0)
    model = build().train()
    meter, _ = armed(model)
    attention = meter._attentions[0]
    inputs: list[Tensor] = []
    attention.query.linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    model(torch.randint(0, 48, (4, 8)))
    parameters = named_parameters_canonical(model)
    bound = meter.read(parameters)["attention_logit_bound"][attention.name]
    query, key = (
        rows.view.read(parameters[rows.view.parameter_name]).detach()
        for rows in (attention.query, attention.key)
    )
    by_hand = attention_logit_bound(
        query, key, inputs[0].norm(dim=-1).max(), num_heads=2, scale=scale
    )
    assert bound == pytest.approx(float(by_hand.max()), rel=EXACT_TOLERANCE)
    heads = [(inputs[0] @ weight.mT).unflatten(-1, (2, 8)) for weight in (query, key)]
    largest = scale * torch.einsum("bihd,bjhd->bhij", *heads).abs().max()
    assert largest <= bound


def test_evaluations_are_not_counted_and_no_pass_at_all_is_an_error() -> None:
    model = gpt2()
    meter, _ = armed(model)
    model.eval()
    model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="no hook ran"):
        meter.read(named_parameters_canonical(model))


def test_a_hook_that_raises_leaves_the_model_alone_and_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise torch.linalg.LinAlgError("no alignment")  # type: ignore[attr-defined]

    monkeypatch.setattr("hf_pss.health.meter.spectral_alignment", fail)
    config = PSSConfig.preset("paper", health="full", health_every_steps=2)
    trainer = train(tmp_path, config, save_strategy="no")
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([x for x in warned if "representations failed: _LinAlgError" in x]) == 1
    assert hooks_of(trainer.model) == 0
    reading = PSSCallback.of(trainer).last_health
    assert "token_cosine" not in reading.matrices
    assert "effective_rank" in reading.matrices


@pytest.mark.parametrize("build", [lambda: gpt2(resid_pdrop=0.1), llama])
def test_a_run_with_hooks_is_the_run_without(tmp_path: Path, build: Any) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    config = PSSConfig.preset("paper", health="full", health_every_steps=1)
    runs = []
    for name, health in (("plain", PSSConfig.preset("paper")), ("looked at", config)):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, health, model=build(), **options)
        trainer.train()
        runs.append(trainer)
    plain, seen = runs
    assert not list(differences(weights_of(plain.model), weights_of(seen.model)))
    assert [x["loss"] for x in history(plain) if "loss" in x] == [
        x["loss"] for x in history(seen) if "loss" in x
    ]
    matrices = PSSCallback.of(seen).last_health.matrices
    logits, bounds = matrices["attention_logit_max"], matrices["attention_logit_bound"]
    assert logits.keys() == bounds.keys()
    assert all(logits[name] <= bounds[name] for name in logits)
    assert hooks_of(seen.model) == 0


@pytest.mark.slow
def test_a_compiled_model_is_not_broken_by_hooks() -> None:
    torch.manual_seed(0)
    model = llama().train()  # no dropout
    tokens = torch.randint(0, 48, (4, 8))
    expected = model(tokens).logits
    meter, _ = armed(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # with the hooks there while it is compiled, and gone
        found = compiled(tokens).logits
        assert torch.allclose(found, expected, atol=EXACT_TOLERANCE)
        meter.disarm()  # of no effect the second time
