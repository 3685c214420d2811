"""Every row of the table of guards trains, through the trainer and with the optimizer it names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import gpt2
from sweep_guards import SETTINGS, trainer_of

from hf_pss.evidence.guards import GUARDS, make_guard

# A rescue treats what a recipe's fault has done, and refuses a trainer without one.
UNFAULTED = [name for name in GUARDS if not name.startswith("rescue_")]


@pytest.mark.parametrize("name", UNFAULTED)
def test_every_guard_trains(name: str, tmp_path: Path) -> None:
    guard = make_guard(name)
    trainer, own = trainer_of(tmp_path, guard, max_steps=4)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert guard.description
    assert guard.source
    if own is not None:
        assert isinstance(own.intervention_steps, list)
        assert own.seconds > 0


@pytest.mark.parametrize("name", [n for n in GUARDS if make_guard(n).optimizer])
def test_packaged_optimizers_leave_vectors_without_weight_decay(name: str) -> None:
    model, guard = gpt2(num_layers=2), make_guard(name)
    if guard.prepare is not None:
        guard.prepare(model)
    optimizer = guard.optimizer(model, SETTINGS)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == {id(p) for p in model.parameters()}
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0)


def test_a_guard_leaves_the_global_generator_alone() -> None:
    for guard in map(make_guard, GUARDS):
        if guard.prepare is not None:
            model = gpt2(num_layers=2)
            before = torch.get_rng_state()
            guard.prepare(model)
            assert torch.equal(before, torch.get_rng_state())
