"""Faults to put into a Trainer's run, each at a step of its own, and each on record."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_pss.trainer import safe_checkpoints as saving

WEIGHT = "transformer.h.0.mlp.c_fc.weight"
DECOMPOSITIONS = ("svd", "svdvals", "qr", "eigh")


@dataclass
class Injector(TrainerCallback):
    """Does harm at the steps it is told, counted from 1, and remembers that it did.

    Attributes:
        plan: What is to happen at which step: keys of `FAULTS`.
        done: What has happened.
    """

    trainer: Trainer
    plan: dict[int, str]
    patch: pytest.MonkeyPatch
    done: list[tuple[int, str]] = field(default_factory=list)
    clock_shift_seconds: float = 0.0
    is_decomposing_broken: bool = False
    is_disk_full: bool = False
    num_full_disks: int = 0

    def __post_init__(self) -> None:
        """Lay the wires; nothing happens before its step."""
        model: Any = self.trainer.model
        if "running" not in dict(model.transformer.named_buffers(recurse=False)):
            model.transformer.register_buffer("running", torch.zeros(3))
        for parameter in model.parameters():
            parameter.register_hook(self._on_gradient)
        inner = self.trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._due("corrupted batch"):
                inputs = {**inputs, "labels": inputs["labels"].flip(0, 1)}
            loss = inner(model, inputs, *args, **kwargs)
            for name, bad in (("NaN loss", math.nan), ("inf loss", math.inf)):
                if self._due(name):
                    loss = loss * bad
            return loss

        self.patch.setattr(self.trainer, "compute_loss", compute_loss)
        self._shift_clocks()
        self._break_decompositions()
        self._fill_disk()
        self.trainer.add_callback(self)

    @property
    def step(self) -> int:
        """The step that is under way."""
        return self.trainer.state.global_step + 1

    def _due(self, name: str) -> bool:
        is_due = self.plan.get(self.step) == name
        if is_due and (self.step, name) not in self.done:
            self.done.append((self.step, name))
        return is_due

    def _on_gradient(self, gradient: Tensor) -> Tensor:
        if self._due("spike"):
            return gradient * 100.0
        for name, bad in (("NaN gradient", math.nan), ("inf gradient", math.inf)):
            if self._due(name):
                gradient = gradient.clone()
                gradient.view(-1)[0] = bad
        return gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Jump, break, fill up."""
        self.is_decomposing_broken = self._due("decomposition fails")
        if self._due("clock jumps"):
            self.clock_shift_seconds -= 86400.0
        self.is_disk_full = self._due("full disk")
        self.num_full_disks += self.is_disk_full

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Break what an update leaves behind."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        weight = model.get_parameter(WEIGHT)
        with torch.no_grad():
            for bad in (math.nan, math.inf):
                word = "NaN" if bad != bad else "inf"
                if self._due(f"{word} weight"):
                    weight[0, 0] = bad
                if self._due(f"{word} momentum"):
                    optimizer.state[weight]["exp_avg"][0, 0] = bad
            if self._due("NaN buffer"):
                model.get_buffer("transformer.running")[0] = math.nan

    def _shift_clocks(self) -> None:
        for name in ("time", "perf_counter"):
            self.patch.setattr(time, name, self._shifted(getattr(time, name)))

    def _shifted(self, clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: clock() + self.clock_shift_seconds

    def _break_decompositions(self) -> None:
        for name in DECOMPOSITIONS:
            self.patch.setattr(torch.linalg, name, self._broken(getattr(torch.linalg, name)))

    def _broken(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_decomposing_broken:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return original(*args, **kwargs)

        return call

    def _fill_disk(self) -> None:
        """Let every other one be full when weights are written, the rest when files are synced."""
        for turn, (owner, name) in enumerate(((saving, "sync_tree"), (self.trainer, "save_model"))):
            self.patch.setattr(owner, name, self._filled(getattr(owner, name), turn))

    def _filled(self, original: Callable[..., Any], turn: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            original(*args, **kwargs)
            if self.is_disk_full and self.num_full_disks % 2 == turn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call


SKIPPED = ("NaN loss", "inf loss", "NaN gradient", "inf gradient")
"""An update is left out, and nothing else happens."""
LASTING = ("NaN weight", "inf weight", "NaN momentum", "inf momentum")
"""Only an older state mends it."""
HARMLESS = ("spike", "corrupted batch", "decomposition fails", "clock jumps", "full disk")
FAULTS = (*SKIPPED, *LASTING, *HARMLESS, "NaN buffer")
