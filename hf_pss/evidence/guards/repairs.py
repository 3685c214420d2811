"""Treatments of a run after a fault at known steps: repair the weights, or roll back."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch

from hf_pss.evidence.guards.weights import MatrixCallback
from hf_pss.evidence.recipes import Fault
from hf_pss.linalg import StableRankCap, noise_stable_rank
from hf_pss.models.smoother import FIRST_MOMENTS

__all__ = ["Rescue"]

Treatment = Literal["smooth", "smooth_and_reset", "reset", "roll_back"]


class Rescue(MatrixCallback):
    """Treats a run once, right after the last step of its fault.

    Args:
        fault: The harmed steps.
        treatment: ``smooth`` caps every matrix at the stable-rank floor ρ · noise. ``reset`` sets
            the optimizer's first moments to zero, and ``smooth_and_reset`` does both.
            ``roll_back`` restores the weights and the optimizer as they were before the fault, and
            continues with the next data.
        floor_ratio: The ratio ρ.
    """

    def __init__(self, fault: Fault, treatment: Treatment, *, floor_ratio: float = 0.8) -> None:
        super().__init__()
        self._fault = fault
        self._treatment = treatment
        self._floor_ratio = floor_ratio
        self._before: tuple[dict[str, Any], dict[str, Any]] | None = None

    def before_step(self, step: int) -> None:
        """Keep a copy of the healthy run."""
        if self._treatment == "roll_back" and step == self._fault.start:
            self._before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Treat the run if the fault has just ended."""
        if step != self._fault.last_step:
            return False
        if self._before is not None:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.model.load_state_dict(self._before[0])
            self.optimizer.load_state_dict(self._before[1])
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if self._treatment.startswith("smooth"):
            floors = {
                view.name: self._floor_ratio * noise_stable_rank(*view.shape[-2:])
                for view in self.views
            }
            self.smooth(
                lambda names: StableRankCap(torch.tensor([floors[name] for name in names])),
                max_rank=32,
            )
        if self._treatment.endswith("reset"):
            for moments in self.optimizer.state.values():
                for key in FIRST_MOMENTS:
                    if key in moments:
                        moments[key].zero_()
        return True
