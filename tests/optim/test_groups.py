"""Which rule moves which parameter of a model; a stored layout moves as its matrices do."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import bert, gpt2, llama
from test_battery import BATCH_TOLERANCE, largest
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError, SelectionError
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.optim import MatrixOptimizer, build_optimizer, matrix_groups

LR = 0.05


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(p): n for n, p in named_parameters_canonical(model).items()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_matrices_are_those_that_pss_selects(make: Any) -> None:
    model = make()
    groups = matrix_groups(model)
    matrices = {
        name
        for names, group in zip(names_of(model, groups), groups, strict=True)
        if group["algo"] == "muon"
        for name in names
    }
    assert matrices == {view.parameter_name for view in select_matrices(model).matrices}
    every = [name for names in names_of(model, groups) for name in names]
    assert sorted(every) == sorted(named_parameters_canonical(model))
    assert len(set(every)) == len(every)


def test_vectors_do_not_decay() -> None:
    for group in matrix_groups(gpt2()):
        if group.get("weight_decay") == 0.0:
            assert all(p.ndim < 2 for p in group["params"])
        else:
            assert all(p.ndim >= 2 for p in group["params"])


def test_frozen_parameters_are_in_no_group() -> None:
    model = gpt2()
    model.transformer.wte.weight.requires_grad_(False)
    groups = matrix_groups(model)
    assert all(p is not model.transformer.wte.weight for g in groups for p in g["params"])


def test_a_table_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_pss"):
        build_optimizer(gpt2())
    lines = caplog.text.splitlines()
    assert any("muon" in line for line in lines)
    assert sum("adamw" in line for line in lines) == 2


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SelectionError, match="matches no parameter"):
        matrix_groups(gpt2(), exclude=["no_such_layer"])


def test_trainer_takes_the_factory() -> None:
    optimizer = build_optimizer(gpt2(), algo="muon", lr=0.01, others_lr=0.002, scale="aspect")
    assert isinstance(optimizer, MatrixOptimizer)
    assert {(g["algo"], g["lr"]) for g in optimizer.param_groups} == {
        ("muon", 0.01),
        ("adamw", 0.002),
    }
    assert optimizer.param_groups[0]["scale"] == "aspect"


@pytest.mark.parametrize("wrong", [{"algo": "moun"}, {"no_such_option": 1}])
def test_meaningless_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        build_optimizer(gpt2(), **{"algo": "muon", **wrong})


def stepped(model: nn.Module, seed: int = 3, steps: int = 3) -> dict[str, tuple[Tensor, ...]]:
    """Step a model on random gradients; return (before, gradients …, after) by name."""
    optimizer = build_optimizer(model, algo="muon", lr=LR, dtype="float32")
    parameters = named_parameters_canonical(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in range(steps):
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=generator)
            seen[name].append(p.grad.clone())
        optimizer.step()
    return {n: (before[n], *seen[n], p.detach()) for n, p in parameters.items()}


def as_plain_matrices(matrices: tuple[Tensor, ...]) -> Tensor:
    """Move one (outputs, inputs) matrix alone by the same gradients."""
    before, *gradients, _ = matrices
    p = nn.Parameter(before.clone())
    optimizer = MatrixOptimizer([{"params": [p], "algo": "muon", "dtype": "float32"}], lr=LR)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


def check_parts(model: nn.Module, name: str, num_parts: int) -> None:
    """Each matrix that PSS sees in a parameter moves as if it were a parameter of its own."""
    tensors = stepped(model)[name]
    views = [v for v in select_matrices(model).matrices if v.parameter_name == name]
    assert len(views) == num_parts
    for view in views:
        stacks = [view.read(tensor) for tensor in tensors]
        stacks = [s if s.ndim == 3 else s[None] for s in stacks]
        for each in zip(*stacks, strict=True):
            assert largest([each[-1]], [as_plain_matrices(each)]) <= BATCH_TOLERANCE


def test_conv1d_moves_as_a_linear_layer_does() -> None:
    check_parts(gpt2(), "transformer.h.0.mlp.c_fc.weight", 1)


def test_fused_projections_move_as_three() -> None:
    check_parts(gpt2(), "transformer.h.0.attn.c_attn.weight", 3)


def test_projections_in_runs_within_heads_move_as_three() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=32,
        max_position_embeddings=8,
    )
    model = GPTNeoXForCausalLM(config)
    check_parts(model, "gpt_neox.layers.0.attention.query_key_value.weight", 3)


def test_stacked_experts_with_interleaved_gate_and_up() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
        num_local_experts=3,
        max_position_embeddings=8,
    )
    model = GptOssForCausalLM(config)
    check_parts(model, "model.layers.0.mlp.experts.gate_up_proj", 2)


def test_the_check_can_fail() -> None:
    """A fused projection orthogonalised whole is another update."""
    model = gpt2()
    tensors = stepped(model)["transformer.h.0.attn.c_attn.weight"]
    whole = as_plain_matrices(tuple(tensor.mT.contiguous() for tensor in tensors))
    assert largest([tensors[-1].mT], [whole]) > BATCH_TOLERANCE
