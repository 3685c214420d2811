"""The first moment of a smoothed matrix: kept, set to zero, or projected."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import gpt2
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hf_pss import PSSConfig, PSSController
from hf_pss.errors import ConfigurationError
from hf_pss.models.smoother import FIRST_MOMENTS

# Worst share of a moment along the edit that `project` left, both optimizers: 6.4e-7 measured.
LEFT_OVER = 2e-6
# The smallest before it was 0.015.
LEFT_ALONE = 5e-3

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9),
}


def trained(make: Factory, moments: str) -> tuple[nn.Module, Optimizer, list[Tensor], list[Tensor]]:
    """Take two steps, the second of which smooths; return weights and moments just before that."""
    torch.manual_seed(0)
    model = gpt2()
    optimizer = make(model.parameters())
    config = PSSConfig.preset(
        "paper",
        detectors=("stable_rank_floor",),
        floor_ratio=3.0,
        floor_reference="noise",
        check_every_steps=2,
        moments=moments,  # type: ignore[arg-type]
    )
    pss = PSSController(model, config, optimizer=optimizer)
    before: list[Tensor] = []
    old: list[Tensor] = []

    def update() -> None:
        optimizer.step()
        before[:] = [p.detach().clone() for p in model.parameters()]
        old[:] = [first_moment(optimizer, p).clone() for p in model.parameters()]

    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.arange(16).reshape(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pss.step(norm, update=update)
    return model, optimizer, before, old


def first_moment(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
    state = optimizer.state[parameter]
    return next(state[key] for key in FIRST_MOMENTS if key in state)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_keep_leaves_every_moment(make: Factory) -> None:
    model, optimizer, before, old = trained(make, "keep")
    changed = 0
    for parameter, weight, moment in zip(model.parameters(), before, old, strict=True):
        changed += not torch.equal(parameter, weight)
        assert torch.equal(first_moment(optimizer, parameter), moment)
    assert changed, "nothing was smoothed"


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_reset_zeroes_the_moments_of_smoothed_matrices_only(make: Factory) -> None:
    model, optimizer, before, old = trained(make, "reset")
    for parameter, weight, moment in zip(model.parameters(), before, old, strict=True):
        now = first_moment(optimizer, parameter)
        if torch.equal(parameter, weight):
            assert torch.equal(now, moment)
        else:
            assert not now.any()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_project_removes_the_component_along_lowered_values(make: Factory) -> None:
    model, optimizer, before, old = trained(make, "project")
    looked_at = 0
    for parameter, weight, moment in zip(model.parameters(), before, old, strict=True):
        now, edit = first_moment(optimizer, parameter), parameter.detach() - weight
        if not edit.any():
            assert torch.equal(now, moment)
        else:  # the edit is a sum over the u_i v_iᵀ that were lowered
            assert share(now, edit) <= LEFT_OVER < LEFT_ALONE <= share(moment, edit)
            looked_at += 1
    assert looked_at


def share(moment: Tensor, edit: Tensor) -> float:
    return ((moment * edit).sum().abs() / moment.norm() / edit.norm()).item()


def test_a_missing_optimizer_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigurationError, match="optimizer=optimizer"):
        PSSController(gpt2(), PSSConfig.preset("paper", moments="reset"))
