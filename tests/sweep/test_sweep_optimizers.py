"""The optimizers of a sweep: the same parameters, rates and decay for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import gpt2
from transformers import TrainingArguments

from hf_pss.evidence.baselines import OPTIMIZERS, make_optimizer
from hf_pss.optim import MatrixOptimizer

SETTINGS = TrainingArguments(
    "unused", learning_rate=1e-2, adam_beta2=0.99, weight_decay=0.1, use_cpu=True
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_are_the_same_for_all(name: str) -> None:
    if name == "pytorch_optimizer_muon":
        pytest.importorskip("pytorch_optimizer")
    model = gpt2()
    groups = make_optimizer(name, model, SETTINGS, matrix_lr_ratio=2.0).param_groups
    assert [group["lr"] for group in groups] == [2e-2, 1e-2, 1e-2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    moved = sum(p.numel() for group in groups for p in group["params"])
    assert moved == sum(p.numel() for p in model.parameters())


def test_muon_is_ours_and_takes_fused_projections_apart() -> None:
    optimizer = make_optimizer("muon", gpt2(), SETTINGS)
    assert isinstance(optimizer, MatrixOptimizer)
    matrices, *others = optimizer.param_groups
    assert [group["algo"] for group in optimizer.param_groups] == ["muon", "adamw", "adamw"]
    assert {len(parts) for _, parts in matrices["layouts"]} == {0, 3}  # c_attn holds q, k and v
    assert all(group["betas"] == (0.9, 0.99) for group in others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_lowers_a_loss(name: str) -> None:
    if name == "pytorch_optimizer_muon":
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model = gpt2()
    optimizer = make_optimizer(name, model, replace(SETTINGS, learning_rate=3e-2))
    tokens = torch.arange(12)[None] % 5
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
