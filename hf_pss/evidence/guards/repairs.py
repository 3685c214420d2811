"""Treatments of a run after a fault of known length: repair the weights, or go back."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.guards.weights import MatrixCallback
from hf_pss.evidence.recipes import Fault
from hf_pss.linalg import StableRankCap, noise_stable_rank
from hf_pss.models.optimizer_state import FIRST_MOMENTS
from hf_pss.models.smoother import smooth_matrices_

__all__ = ["Rescue"]

Treatment = Literal["smooth", "smooth_and_reset", "reset", "roll_back"]


class Rescue(MatrixCallback):
    """Treats a run once, right after the last step of its fault.

    Args:
        fault: Which steps were harmed.
        treatment: Cap every matrix at the stable-rank floor ρ · noise; the same and set the
            optimizer's first moments to zero; only the latter; or restore weights and optimizer as
            they were before the fault, and go on with the data that comes next.
        floor_ratio: ρ.
    """

    def __init__(self, fault: Fault, treatment: Treatment, *, floor_ratio: float = 0.8) -> None:
        super().__init__()
        self._fault = fault
        self._treatment = treatment
        self._floor_ratio = floor_ratio
        self._before: tuple[dict[str, Any], dict[str, Any]] | None = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep a copy of the healthy run."""
        if self._treatment == "roll_back" and state.global_step + 1 == self._fault.start:
            model, optimizer = _given(model, optimizer)
            self._before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Treat the run if the fault has just ended."""
        if state.global_step != self._fault.last_step:
            return
        model, optimizer = _given(model, optimizer)
        with self.clock():
            if self._before is not None:
                rates = [group["lr"] for group in optimizer.param_groups]
                model.load_state_dict(self._before[0])
                optimizer.load_state_dict(self._before[1])
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
            if self._treatment.startswith("smooth"):
                parameters, backend = self.stored()
                floors = {v.name: noise_stable_rank(*v.shape[-2:]) for v in self.views}
                smooth_matrices_(
                    self.views,
                    parameters,
                    backend,
                    lambda names: StableRankCap(
                        torch.tensor([self._floor_ratio * floors[name] for name in names])
                    ),
                    max_rank=32,
                )
            if self._treatment.endswith("reset"):
                for moments in optimizer.state.values():
                    for key in FIRST_MOMENTS:
                        if key in moments:
                            moments[key].zero_()
            self.intervention_steps.append(state.global_step)


def _given(model: nn.Module | None, optimizer: Any) -> tuple[nn.Module, Optimizer]:
    if model is None or optimizer is None:
        raise ConfigurationError("A rescue needs the trainer's model and optimizer; got none.")
    return model, getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
