"""Real runs of the Trainer, seconds long, that fail in known ways at a known step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import gpt2, make_trainer
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_pss import PSSConfig

NUM_STEPS = 120
FAILS_AT = 71
SAVE_STEPS = 20

Act = Callable[[int, nn.Module, Any], None]


class Damage(TrainerCallback):
    """Calls a function after every update, before the step is logged and saved."""

    def __init__(self, act: Act) -> None:
        self._act = act

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._act(state.global_step, kwargs["model"], kwargs["optimizer"])


def _matrix(model: nn.Module) -> nn.Parameter:
    return model.transformer.h[0].mlp.c_fc.weight


def _nan(step: int, model: nn.Module, optimizer: Any) -> None:
    if step == FAILS_AT - 1:  # so that the next loss is the first that is NaN
        _matrix(model)[0, 0] = torch.nan


def _huge_rate(step: int, model: nn.Module, optimizer: Any) -> None:
    if step == FAILS_AT - 1:
        for group in optimizer.param_groups:
            group["lr"] = 3.0


def _decay(step: int, model: nn.Module, optimizer: Any) -> None:
    if step >= FAILS_AT:
        for parameter in model.parameters():
            parameter.mul_(0.965)


def _stuck(step: int, model: nn.Module, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0


def _sound(step: int, model: nn.Module, optimizer: Any) -> None:
    pass


class _Spiking:
    """Damages embedding and head for three steps and puts them back."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None

    def __call__(self, step: int, model: nn.Module, optimizer: Any) -> None:
        weight = model.get_parameter("transformer.wte.weight")
        if step == FAILS_AT - 1:
            self._kept = weight.detach().clone()
            weight.mul_(-9)
        elif step == FAILS_AT + 2 and self._kept is not None:
            weight.copy_(self._kept)


ACTS: dict[str, Callable[[], Act]] = {
    "nan": lambda: _nan,
    "huge_rate": lambda: _huge_rate,
    "decay": lambda: _decay,
    "stuck": lambda: _stuck,
    "sound": lambda: _sound,
    "recovers": _Spiking,
}


def fail(folder: Path, how: str, pss: PSSConfig | None = None, **options: Any) -> Trainer:
    """Train 120 steps with a damage from step 71 on, and a checkpoint every 20."""
    defaults = {
        "max_steps": NUM_STEPS,
        "save_steps": SAVE_STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    trainer = make_trainer(
        folder, pss, model=gpt2(num_layers=2, width=32), **{**defaults, **options}
    )
    trainer.add_callback(Damage(ACTS[how]()))
    trainer.train()
    return trainer
