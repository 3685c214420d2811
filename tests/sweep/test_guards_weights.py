"""Guards on the weights: the promised properties of the matrices, and the steps of action."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import gpt2, mixtral, token_rows
from sweep_guards import trainer_of

from hf_pss import PSSConfig, select_matrices
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.guard_callbacks import (
    Assr,
    LearningRateDrop,
    NormCap,
    ScheduledSmoothing,
    SpectralCap,
    sigma_reparam_,
)
from hf_pss.evidence.guards import Guard, make_guard
from hf_pss.linalg import spectral_norm
from hf_pss.models.selection import named_parameters_canonical
from hf_pss.trainer.callback import PSSCallback

LOGITS = 2.5e-7  # absolute; 8.9e-8 measured, logits are of the order 0.1
PENALTY = 2.4e-7  # relative, 8.2e-8
ROUNDING = 1 + 1e-6
ABOVE_CAP = 1.04  # 1.0134 measured: power iteration sees σ₁ from below


def test_sigma_reparam_starts_as_the_same_function() -> None:
    model = gpt2(num_layers=2)
    rows = torch.stack([row["input_ids"] for row in token_rows(4)])
    before = model.eval()(rows).logits
    sigma_reparam_(model)
    assert (model.eval()(rows).logits - before).abs().max() < LOGITS
    model.train()
    weight = model.transformer.h[0].attn.c_attn.weight
    gain = model.transformer.h[0].attn.c_attn.parametrizations.weight[1].gain
    assert math.isclose(spectral_norm(weight.detach()), gain.item(), rel_tol=1e-4)


def test_sigma_reparam_starts_at_a_given_gain_and_refuses_stacks_of_experts() -> None:
    model = gpt2(num_layers=1)
    sigma_reparam_(model, gain=1.0)
    assert spectral_norm(model.transformer.h[0].mlp.c_fc.weight.detach()) == pytest.approx(1.0)
    with pytest.raises(ConfigurationError, match="stack of matrices"):
        sigma_reparam_(mixtral())


def test_spectral_cap_holds(tmp_path: Path) -> None:
    guard = Guard("", "", callback=lambda trainer: SpectralCap(factor=0.05))
    trainer, own = trainer_of(tmp_path, guard, max_steps=8, learning_rate=1e-2)
    trainer.train()
    assert own is not None
    assert own.intervention_steps
    parameters = named_parameters_canonical(trainer.model)
    for view in select_matrices(trainer.model).matrices:
        weight = view.read(parameters[view.parameter_name])
        m, n = weight.shape
        assert spectral_norm(weight) < ABOVE_CAP * 0.05 * (1 + math.sqrt(m / n))


def test_norm_cap_holds(tmp_path: Path) -> None:
    guard = Guard("", "", callback=lambda trainer: NormCap(factor=1.02))
    trainer, own = trainer_of(tmp_path, guard, max_steps=8, learning_rate=1e-2)
    views = select_matrices(trainer.model).matrices

    def norms() -> torch.Tensor:
        parameters = named_parameters_canonical(trainer.model)
        return torch.stack([view.read(parameters[view.parameter_name]).norm() for view in views])

    start = norms()
    trainer.train()
    assert own is not None
    assert own.intervention_steps
    assert (norms() / start).max() < 1.02 * ROUNDING


def test_the_penalty_of_assr_is_a_term_of_the_loss(tmp_path: Path) -> None:
    guard = Guard("", "", callback=lambda t: Assr(base_lambda=0.1, floor=0.9, seed=t.args.seed))
    trainer, own = trainer_of(tmp_path, guard, model=gpt2(num_layers=4), max_steps=1)
    own.model = trainer.model
    own.prepare()
    own.before_step(1)
    parameters = named_parameters_canonical(trainer.model)
    found = []
    for view in select_matrices(trainer.model).matrices:
        parameter = parameters[view.parameter_name]
        weight = view.read(parameter.detach()).double().requires_grad_()
        sigma = torch.linalg.svdvals(weight.detach())
        severity = 1 - sigma.square().sum() / sigma[0].square() / sigma.numel() / 0.9
        (0.1 * (1 + 10 * severity) * weight.square().sum()).backward()
        gradient = parameter.grad if parameter.grad is None else view.read(parameter.grad)
        if gradient is not None and gradient.any():
            assert weight.grad is not None
            found.append(float((gradient - weight.grad).norm() / weight.grad.norm()))
    assert len(found) == 2  # a tenth of 24
    assert max(found) < PENALTY


def test_assr_leaves_healthy_and_broken_matrices_alone() -> None:
    healthy, low, ill = torch.eye(8), torch.diag(torch.tensor([9.0, *[1.0] * 7])), torch.eye(8)
    ill[7, 7] = 1e-3
    factors = Assr()._factors(torch.stack([healthy, low, ill, healthy * math.nan]))
    severities = [1 - (88 / 81 / 8) / 0.25, (1000 / 500 - 1) / 10]
    wanted = [0.0, *(1e-4 * (1 + 10 * severity) for severity in severities), 0.0]
    assert factors.tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_penalty_of_assr_reaches_the_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    norms = []
    for base_lambda in (1e-30, 1.0):
        options = {"base_lambda": base_lambda, "floor": 0.9}
        trainer, own = trainer_of(tmp_path, make_guard("assr", options), max_steps=3)
        trainer.train()
        assert own is not None
        assert own.intervention_steps == [1, 2, 3]
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] > 1.5 * norms[0]


@pytest.mark.parametrize(
    ("name", "options", "acts"),
    [
        ("floor_first", {"steps": 3}, [1, 2, 3]),
        ("floor_with_lr", {}, [4, 5]),
    ],
)
def test_a_floor_acts_as_long_as_its_schedule_lets_it(
    name: str, options: dict[str, int], acts: list[int], tmp_path: Path
) -> None:
    eager = {"floor_reference": "noise", "floor_ratio": 1.5, "check_every_steps": 1}
    guard = make_guard(name, {**eager, **options})
    trainer, own = trainer_of(
        tmp_path, guard, max_steps=8, warmup_steps=4, lr_scheduler_type="linear", learning_rate=1e-5
    )
    trainer.train()
    assert own is not None
    assert own.intervention_steps == acts


@pytest.mark.parametrize("smoothing", ["clip", "polar"])
def test_scheduled_smoothing_keeps_its_rhythm(smoothing: str, tmp_path: Path) -> None:
    guard = Guard("", "", callback=lambda trainer: ScheduledSmoothing(smoothing, every_steps=3))
    trainer, own = trainer_of(tmp_path, guard, max_steps=6)
    trainer.train()
    assert own is not None
    assert own.intervention_steps == [3, 6]
    parameters = named_parameters_canonical(trainer.model)
    for view in select_matrices(trainer.model).matrices:
        sigma = torch.linalg.svdvals(view.read(parameters[view.parameter_name]))
        if smoothing == "polar":
            assert sigma[0] / sigma[-1] < 1.001
        else:
            assert sigma[0] / sigma[1] < 1.001


def test_the_hammer_levels_the_first_two_values(tmp_path: Path) -> None:
    guard = Guard(
        "", "", callback=lambda t: ScheduledSmoothing("hammer", every_steps=1, max_rank=1)
    )
    trainer, own = trainer_of(tmp_path, guard, max_steps=3)
    trainer.train()
    assert own is not None
    assert own.intervention_steps == [1, 2, 3]
    parameters = named_parameters_canonical(trainer.model)
    for view in select_matrices(trainer.model).matrices:
        sigma = torch.linalg.svdvals(view.read(parameters[view.parameter_name]))
        assert sigma[0] / sigma[1] < 1.001


def test_random_steps_are_the_seeds_and_as_many() -> None:
    def steps(seed: int) -> list[int]:
        own = ScheduledSmoothing("clip", random_seed=seed)
        return [step for step in range(1, 20001) if own._is_due(step)]

    assert steps(3) == steps(3)
    assert steps(3) != steps(4)
    assert 150 < len(steps(3)) < 250  # 200 expected, standard deviation 14


def test_the_learning_rate_drops_for_good(tmp_path: Path) -> None:
    eager = PSSConfig.preset(
        "paper", observe_only=True, threshold_ratio=1.0001, calibration_steps=1, baseline_alpha=0.5
    )
    guard = Guard(
        "",
        "",
        pss=eager,
        callback=lambda trainer: LearningRateDrop(PSSCallback.of(trainer), cooldown_steps=1),
    )
    trainer, own = trainer_of(
        tmp_path, guard, max_steps=10, lr_scheduler_type="constant", learning_rate=0.1
    )
    trainer.train()
    assert own is not None
    steps = own.intervention_steps
    assert steps
    assert all(b - a > 1 for a, b in itertools.pairwise(steps))
    wanted = 0.1 * 0.5 ** len(steps)
    assert math.isclose(trainer.optimizer.param_groups[0]["lr"], wanted)
    assert math.isclose(trainer.lr_scheduler.get_last_lr()[0], wanted) or steps[-1] == 10
