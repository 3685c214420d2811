"""Treatments after a fault: each acts once, at the fault's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments, gpt2, token_rows
from torch import Tensor
from transformers import TrainerCallback, set_seed

from hf_pss import PSSTrainer
from hf_pss.config import PSSConfig
from hf_pss.evidence.guard_callbacks import Rescue, Treatment
from hf_pss.evidence.recipes import Fault
from hf_pss.linalg import noise_stable_rank
from hf_pss.models.selection import named_parameters_canonical, select_matrices

FAULT = Fault("high_learning_rate", start=3, num_steps=2, factor=30.0)
FLOOR_RATIO = 0.8
RANK_BAND = 1e-5  # 3.5e-6: how far below the floor a matrix ends, relative

Snapshot = dict[str, Tensor]


class Harm(TrainerCallback):
    """Makes one direction of every matrix dominant in the first step of the fault."""

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FAULT.start:
            for view in select_matrices(kwargs["model"]).matrices:
                parameter = kwargs["model"].get_parameter(view.parameter_name)
                u, s, vh = torch.linalg.svd(view.read(parameter), full_matrices=False)
                s[..., 0] *= 5
                view.write_(parameter, u @ (s.unsqueeze(-1) * vh))


class Watch(TrainerCallback):
    """Keeps weights and first moments after each step; 0 is before the first."""

    def __init__(self) -> None:
        self.weights: dict[int, Snapshot] = {}
        self.moments: dict[int, list[Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[0] = copy_of(kwargs["model"].state_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        self.weights[step] = copy_of(kwargs["model"].state_dict())
        self.moments[step] = [s["exp_avg"].clone() for s in optimizer.state.values()]


def copy_of(state: Snapshot) -> Snapshot:
    return {name: value.detach().clone() for name, value in state.items()}


def same(a: Snapshot, b: Snapshot) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def treated(folder: Path, treatment: Treatment | None) -> tuple[Watch, Rescue | None, PSSTrainer]:
    set_seed(7)
    trainer = PSSTrainer(
        model=gpt2(num_layers=1, width=32),
        args=arguments(folder, save_strategy="no", max_steps=6),
        train_dataset=token_rows(),
        pss_config=PSSConfig.preset("paper", observe_only=True),
    )
    rescue = Rescue(FAULT, treatment) if treatment else None
    watch = Watch()
    for callback in (Harm(), rescue, watch):
        if callback is not None:
            trainer.add_callback(callback)
    trainer.train()
    return watch, rescue, trainer


def lowest_share(state: Snapshot, trainer: PSSTrainer) -> float:
    """Stable rank over that of noise, of the worst matrix."""
    assert trainer.model is not None
    parameters = named_parameters_canonical(trainer.model)
    shares = []
    for view in select_matrices(trainer.model).matrices:
        kept = torch.nn.Parameter(state[view.parameter_name].clone())
        assert kept.shape == parameters[view.parameter_name].shape
        sigma = torch.linalg.svdvals(view.read(kept).detach().double())
        rank = float(sigma.square().sum() / sigma[0].square())
        shares.append(rank / noise_stable_rank(*view.shape[-2:]))
    return min(shares)


@pytest.mark.parametrize("treatment", ["smooth", "smooth_and_reset", "reset", "roll_back"])
def test_it_acts_once_at_the_end_of_the_fault(tmp_path: Path, treatment: Treatment) -> None:
    watch, rescue, _ = treated(tmp_path / "treated", treatment)
    alone, _, _ = treated(tmp_path / "alone", None)
    assert rescue is not None
    assert rescue.intervention_steps == [FAULT.last_step]
    assert rescue.seconds > 0
    assert all(same(watch.weights[s], alone.weights[s]) for s in range(FAULT.last_step))
    assert not same(watch.weights[6], alone.weights[6])


def test_rolling_back_restores_the_weights_bit_for_bit(tmp_path: Path) -> None:
    watch, _, trainer = treated(tmp_path, "roll_back")
    before = FAULT.start - 1
    assert not same(watch.weights[FAULT.start], watch.weights[before])
    assert same(watch.weights[FAULT.last_step], watch.weights[before])
    for ours, theirs in zip(watch.moments[FAULT.last_step], watch.moments[before], strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.state.global_step == 6  # on with the data that comes next
    assert not same(watch.weights[6], watch.weights[before])


@pytest.mark.parametrize("treatment", ["smooth", "smooth_and_reset"])
def test_smoothing_raises_the_lowest_stable_rank(tmp_path: Path, treatment: Treatment) -> None:
    watch, _, trainer = treated(tmp_path / "treated", treatment)
    alone, _, _ = treated(tmp_path / "alone", None)
    before = lowest_share(alone.weights[FAULT.last_step], trainer)
    after = lowest_share(watch.weights[FAULT.last_step], trainer)
    assert before < FLOOR_RATIO
    assert after > before
    assert after >= FLOOR_RATIO * (1 - RANK_BAND)


@pytest.mark.parametrize("treatment", ["reset", "smooth_and_reset"])
def test_resetting_zeroes_every_first_moment(tmp_path: Path, treatment: Treatment) -> None:
    watch, _, _ = treated(tmp_path, treatment)
    assert not any(moment.any() for moment in watch.moments[FAULT.last_step])
    assert all(moment.any() for moment in watch.moments[FAULT.last_step - 1])
    assert any(moment.any() for moment in watch.moments[FAULT.last_step + 1])


def test_resetting_leaves_the_weights_of_that_step_alone(tmp_path: Path) -> None:
    watch, _, _ = treated(tmp_path / "treated", "reset")
    alone, _, _ = treated(tmp_path / "alone", None)
    assert same(watch.weights[FAULT.last_step], alone.weights[FAULT.last_step])
