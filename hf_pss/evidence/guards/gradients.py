"""Guards that judge the gradient's norm: ZClip scales the gradient, OLMo's skips the step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_pss.evidence.guards.base import ActingCallback

__all__ = ["OlmoSkipStep", "SkipStepRule", "ZClip", "ZClipRule"]

# As in their code: keeps a z-score finite when the norm has not varied.
_EPS = 1e-6


class ZClipRule:
    """Mean μ and variance s² of the norm by moving averages, and the norm that a spike gets.

    With z = (g − μ)/s, a norm with z > z_thresh is brought to μ + (z_thresh²/z)·s. The averages
    take the clipped norm: μ ← αμ + (1 − α)g, then s² ← αs² + (1 − α)(g − μ)²; they start from
    mean and variance of the first 25 norms (ZClip, arXiv 2504.02507, and its authors' code).

    A norm that is not finite is not averaged; theirs averages it and is blind from then on.
    """

    def __init__(
        self, *, alpha: float = 0.97, z_thresh: float = 2.5, calibration_steps: int = 25
    ) -> None:
        self.alpha, self.z_thresh = alpha, z_thresh
        self.mean = self.variance = 0.0
        self._first: list[float] = []
        self._calibration_steps = calibration_steps

    def limit(self, grad_norm: float) -> float | None:
        """Take a norm and return what to clip it to; None leaves it."""
        if not math.isfinite(grad_norm):
            return None
        if len(self._first) < self._calibration_steps:
            self._first.append(grad_norm)
            count = len(self._first)
            self.mean = sum(self._first) / count
            self.variance = sum((g - self.mean) ** 2 for g in self._first) / count
            return None
        deviation = math.sqrt(self.variance)
        z = (grad_norm - self.mean) / (deviation + _EPS)
        limit = None
        if z > self.z_thresh:
            limit = self.mean + self.z_thresh**2 / z * deviation
        seen = grad_norm if limit is None else limit
        self.mean = self.alpha * self.mean + (1 - self.alpha) * seen
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (seen - self.mean) ** 2
        return limit


class ZClip(ActingCallback):
    """Clips the global gradient norm by `ZClipRule`; needs ``max_grad_norm=0`` to see it raw."""

    def __init__(self, rule: ZClipRule | None = None) -> None:
        super().__init__()
        self.rule = rule if rule is not None else ZClipRule()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Scale the gradients of a spike."""
        with self.clock():
            gradients = _gradients(model)
            # The guard's one read to the host.
            norm = float(nn.utils.get_total_norm(gradients)) if gradients else math.nan
            limit = self.rule.limit(norm)
            if limit is not None:
                torch._foreach_mul_(gradients, limit / norm)
                self.intervention_steps.append(state.global_step + 1)


class SkipStepRule:
    """Skip when the loss or the norm exceeds mean + 6 standard deviations of the last 128 values.

    Judges once 64 values are there, as OLMo-core's SkipStepOptimizer does. Every finite value
    enters its window, skipped or not, as theirs. A value that is not finite is skipped and does
    not enter; with theirs the 128 steps after it are skipped, too.
    """

    def __init__(self, *, window_steps: int = 128, sigma_factor: float = 6.0) -> None:
        self._sigma_factor = sigma_factor
        self._minimum = max(2, window_steps // 2)
        self._windows: tuple[deque[float], ...] = tuple(deque(maxlen=window_steps) for _ in "lg")

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Take a step's loss and norm and tell whether its update must not happen."""
        judgements = [
            self._is_outlier(window, value)
            for window, value in zip(self._windows, (loss, grad_norm), strict=True)
        ]
        return any(judgements)

    def _is_outlier(self, window: deque[float], value: float) -> bool:
        if not math.isfinite(value):
            return True
        # They count the value itself: 63 before it make 64.
        judges = len(window) + 1 >= self._minimum
        limit = _mean_plus(window, self._sigma_factor) if judges else math.inf
        window.append(value)
        return value > limit


class OlmoSkipStep(ActingCallback):
    """Drops the gradients of a step by `SkipStepRule`.

    Theirs multiplies the update by zero, so that the moments decay and a NaN stays NaN; here the
    optimizer passes the parameters over and its moments keep their values.
    """

    def __init__(
        self,
        read: Callable[[], tuple[float | None, float | None]],
        rule: SkipStepRule | None = None,
    ) -> None:
        super().__init__()
        self._read = read
        self.rule = rule if rule is not None else SkipStepRule()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Judge the norm before clipping and the loss."""
        with self.clock():
            loss, norm = (math.nan if v is None else v for v in self._read())
            if self.rule.skips(loss, norm) and model is not None:
                for parameter in model.parameters():
                    parameter.grad = None
                self.intervention_steps.append(state.global_step + 1)


def _mean_plus(values: Sequence[float], sigma_factor: float) -> float:
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / max(1, count - 1)
    return mean + sigma_factor * math.sqrt(variance)


def _gradients(model: nn.Module | None) -> list[Tensor]:
    parameters = model.parameters() if model is not None else ()
    return [p.grad for p in parameters if p.grad is not None]
