"""GradientNorms adds the norm of each parameter's gradient to the log of a plain Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import make_trainer, run_differences, train
from transformers import Trainer, TrainerCallback

from hf_pss import ConfigurationError, GradientNorms, PSSConfig
from hf_pss.trainer import gradient_norms

# Relative, float32: the sum of the parts against the total that the Trainer logs.
SUM_DRIFT = 1e-6
HALF_DRIFT = 0.05  # of a forward pass in fp16
CLIPPED = {"max_grad_norm": 1e-3, "max_steps": 4}


class Witness(TrainerCallback):
    """Reads the gradients by hand, after clipping."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}


class ClipsByItself(Trainer):
    """Clips without its accelerator."""

    def _clip_grad_norm(self, model: Any) -> Any:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


class TurnsIntoDeepSpeed(TrainerCallback):
    """Gives the accelerator the backend of DeepSpeed once the model is prepared."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        shared = AcceleratorState._shared_state
        self.patch.setitem(shared, "distributed_type", DistributedType.DEEPSPEED)


def norms_of(line: dict[str, float]) -> dict[str, float]:
    start = "grad_norm/"
    return {name.removeprefix(start): v for name, v in line.items() if name.startswith(start)}


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def trained(folder: Path, callback: TrainerCallback, *more: TrainerCallback, **options: Any) -> Any:
    trainer = make_trainer(folder, **options)
    for one in (callback, *more):
        trainer.add_callback(one)
    trainer.train()
    return trainer


def test_norms_are_those_before_clipping_and_add_up_to_the_trainers_own(tmp_path: Path) -> None:
    witness = Witness()
    options = {**CLIPPED, "gradient_accumulation_steps": 2}
    trainer = trained(tmp_path, GradientNorms(), witness, **options)
    for line in logged(trainer):
        total = math.hypot(*norms_of(line).values())
        assert total == pytest.approx(line["grad_norm"], rel=SUM_DRIFT)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    last = logged(trainer)[-1]
    clipped = {
        n: v * CLIPPED["max_grad_norm"] / last["grad_norm"] for n, v in norms_of(last).items()
    }
    assert clipped == pytest.approx(witness.norms, rel=1e-4)


def test_blocks_combine_their_parameters_and_the_rest_stands_alone(tmp_path: Path) -> None:
    by_parameter = trained(tmp_path / "a", GradientNorms(), **CLIPPED)
    by_block = trained(tmp_path / "b", GradientNorms(per="block"), **CLIPPED)
    each, blocks = (norms_of(logged(one)[-1]) for one in (by_parameter, by_block))
    assert set(blocks) == {
        "transformer.h.0",
        *(name for name in each if not name.startswith("transformer.h.")),
    }
    inside = [norm for name, norm in each.items() if name.startswith("transformer.h.0.")]
    assert blocks["transformer.h.0"] == pytest.approx(math.hypot(*inside))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.5}, [4, 8]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_only_steps_that_are_logged_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: list[int]
) -> None:
    measured = []
    measure = gradient_norms.gradient_norms

    def counted(*args: Any) -> Any:
        measured.append(trainer.state.global_step + 1)
        return measure(*args)

    monkeypatch.setattr(gradient_norms, "gradient_norms", counted)
    trainer = make_trainer(tmp_path, **options)
    trainer.add_callback(GradientNorms())
    trainer.train()
    assert measured == steps
    assert [line["step"] for line in logged(trainer) if norms_of(line)] == steps


def test_epochs_log_the_norms_of_their_last_step(tmp_path: Path) -> None:
    options = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
    trainer = trained(tmp_path, GradientNorms(), **options)
    (line,) = logged(trainer)
    assert math.hypot(*norms_of(line).values()) == pytest.approx(line["grad_norm"], rel=SUM_DRIFT)


def test_a_nan_is_named_where_it_began(tmp_path: Path) -> None:
    """After clipping by a NaN norm every gradient is NaN."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * math.nan)
    trainer.add_callback(GradientNorms())
    trainer.train()
    broken = {name for name, norm in norms_of(logged(trainer)[0]).items() if math.isnan(norm)}
    assert broken == {"transformer.h.0.mlp.c_fc.weight"}


def test_a_trainer_that_clips_by_itself_is_measured_after_clipping(tmp_path: Path) -> None:
    trainer = trained(tmp_path, GradientNorms(), trainer_class=ClipsByItself, **CLIPPED)
    total = math.hypot(*norms_of(logged(trainer)[-1]).values())
    assert total == pytest.approx(CLIPPED["max_grad_norm"], rel=1e-3)


def test_it_changes_no_run_and_works_beside_pss_and_twice(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", max_steps=4)
    options: dict[str, Any] = {"pss": PSSConfig(observe_only=True), "max_steps": 4}
    watched = trained(tmp_path / "watched", GradientNorms(), **options)
    for line in watched.state.log_history:
        for name in norms_of(line):
            del line[f"grad_norm/{name}"]
    assert [d for d in run_differences(plain, watched) if not d.startswith("log")] == []
    watched.train()
    assert all(norms_of(line) for line in logged(watched))


def test_loss_scaling_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp16 the gradients carry the scale until they are clipped."""
    plain = trained(tmp_path / "a", GradientNorms(), max_steps=1)
    trainer = make_trainer(tmp_path / "b", max_steps=1)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp = True
    # Accelerate refuses to set this up on a CPU.
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    trainer.add_callback(GradientNorms())
    trainer.train()
    expected, found = (norms_of(logged(one)[0]) for one in (plain, trainer))
    assert found == pytest.approx(expected, rel=HALF_DRIFT)


def test_deepspeed_and_an_unknown_grouping_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="'parameter' or 'block'"):
        GradientNorms(per="layer")  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path)
    trainer.add_callback(GradientNorms())
    trainer.callback_handler.callbacks.insert(0, TurnsIntoDeepSpeed(monkeypatch))
    with pytest.raises(ConfigurationError, match="cannot work under DeepSpeed"):
        trainer.train()
