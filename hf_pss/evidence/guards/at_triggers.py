"""Guards that act at PSS's own trigger, but do something else than smooth."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_pss.detection import Verdict
from hf_pss.evidence.guards.base import ActingCallback
from hf_pss.trainer.callback import PSSCallback

__all__ = ["LearningRateDrop"]


class LearningRateDrop(ActingCallback):
    """Multiplies the learning rate for the rest of the run where PSS would have smoothed.

    Args:
        pss: Observes with the trigger of the preset ``paper``; called before this one.
        factor: On the schedule, and so on every later step.
        cooldown_steps: Steps after a drop during which no other comes, as PSS counts them.
    """

    def __init__(self, pss: PSSCallback, *, factor: float = 0.5, cooldown_steps: int = 10) -> None:
        super().__init__()
        self._pss = pss
        self._factor = factor
        self._cooldown_steps = cooldown_steps

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: object,
    ) -> None:
        """Lower the rate after a step that PSS judges a spike."""
        with self.clock():
            report, step = self._pss.report, state.global_step
            if report is None or report.verdict is not Verdict.SPIKE or self._is_cooling_down(step):
                return
            lr_scheduler.base_lrs = [rate * self._factor for rate in lr_scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] *= self._factor
            self.intervention_steps.append(step)

    def _is_cooling_down(self, step: int) -> bool:
        past = self.intervention_steps
        return bool(past) and step - past[-1] <= self._cooldown_steps
