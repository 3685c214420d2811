"""Guards that judge the gradient's norm: scale the gradient, skip the step, or lower the rate."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_pss.detection.detectors import Verdict
from hf_pss.evidence.guards.base import TimedCallback
from hf_pss.trainer.callback import PSSCallback

__all__ = ["LearningRateDrop", "OlmoSkipStep", "SkipStepRule", "ZClip", "ZClipRule"]

# This keeps a z-score finite when the norm has not varied, as in the authors' code.
_EPS = 1e-6


class ZClipRule:
    """Keep moving averages of the norm's mean μ and variance s², and limit its spikes.

    Let z = (g − μ)/s. A norm with z > z_thresh is clipped to μ + (z_thresh²/z)·s. The averages
    take the clipped norm: μ ← αμ + (1 − α)g, then s² ← αs² + (1 − α)(g − μ)². They start from the
    mean and variance of the first 25 norms. The rule is that of ZClip (arXiv 2504.02507) and of
    the code by its authors.

    A norm that is not finite does not enter the averages. In the authors' code it does, and the
    code detects nothing from then on.
    """

    def __init__(
        self, *, alpha: float = 0.97, z_thresh: float = 2.5, calibration_steps: int = 25
    ) -> None:
        self.alpha, self.z_thresh = alpha, z_thresh
        self.mean = self.variance = 0.0
        self._first: list[float] = []
        self._calibration_steps = calibration_steps

    def limit(self, grad_norm: float) -> float | None:
        """Take a norm and return the norm to clip it to; None leaves the gradient as it is."""
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


class ZClip(TimedCallback):
    """Clips the global gradient norm by `ZClipRule`; needs ``max_grad_norm=0``."""

    def __init__(self, rule: ZClipRule | None = None) -> None:
        super().__init__()
        self.rule = rule if rule is not None else ZClipRule()

    def before_update(self) -> bool:
        """Scale the gradients of a spike."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # This is the only device-to-host read of the guard.
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else math.nan
        limit = self.rule.limit(norm)
        if limit is None:
            return False
        torch._foreach_mul_(gradients, limit / norm)
        return True


class SkipStepRule:
    """Skip when the loss or the norm exceeds mean + 6 standard deviations of the last 128 values.

    The rule applies from the 64th value on, as in OLMo-core's SkipStepOptimizer. As there,
    every finite value enters its window, even if its step is skipped. A step with a value that
    is not finite is skipped, and that value does not enter the window. OLMo-core then also
    skips the next 128 steps.
    """

    def __init__(self, *, window_steps: int = 128, sigma_factor: float = 6.0) -> None:
        self._sigma_factor = sigma_factor
        self._minimum = max(2, window_steps // 2)
        self._windows: tuple[deque[float], ...] = tuple(deque(maxlen=window_steps) for _ in "lg")

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Take the loss and the norm of a step, and return whether to skip its update."""
        judgements = [
            self._is_outlier(window, value)
            for window, value in zip(self._windows, (loss, grad_norm), strict=True)
        ]
        return any(judgements)

    def _is_outlier(self, window: deque[float], value: float) -> bool:
        if not math.isfinite(value):
            return True
        # OLMo-core counts the value itself: with the 63 values before it there are 64.
        judges = len(window) + 1 >= self._minimum
        limit = _mean_plus(window, self._sigma_factor) if judges else math.inf
        window.append(value)
        return value > limit


class OlmoSkipStep(TimedCallback):
    """Drops the gradients of a step by `SkipStepRule`.

    OLMo-core multiplies the update by zero, so the moments decay and a NaN stays NaN. Here the
    optimizer skips the parameters, and its moments keep their values.
    """

    def __init__(
        self,
        read: Callable[[], tuple[float | None, float | None]],
        rule: SkipStepRule | None = None,
    ) -> None:
        super().__init__()
        self._read = read
        self.rule = rule if rule is not None else SkipStepRule()

    def before_update(self) -> bool:
        """Judge the loss and the norm before clipping."""
        loss, norm = (math.nan if value is None else value for value in self._read())
        if not self.rule.skips(loss, norm):
            return False
        for parameter in self.model.parameters():
            parameter.grad = None
        return True


class LearningRateDrop(TimedCallback):
    """Multiplies the learning rate for the rest of the run where PSS would have smoothed.

    Args:
        pss: A callback that observes with the trigger of the preset ``paper``. It must come
            before this callback.
        factor: The factor on the schedule, and therefore on the rate of every later step.
        cooldown_steps: Number of steps after a drop in which no other drop happens. PSS counts its
            cooldown in the same way.
    """

    def __init__(self, pss: PSSCallback, *, factor: float = 0.5, cooldown_steps: int = 10) -> None:
        super().__init__()
        self._pss = pss
        self._factor = factor
        self._cooldown_steps = cooldown_steps

    def after_step(self, step: int) -> bool:
        """Lower the rate after a step that PSS judges a spike."""
        report, past = self._pss.report, self.intervention_steps
        is_cooling_down = bool(past) and step - past[-1] <= self._cooldown_steps
        if report is None or report.verdict is not Verdict.SPIKE or is_cooling_down:
            return False
        rates = [rate * self._factor for rate in self.lr_scheduler.base_lrs]
        self.lr_scheduler.base_lrs = rates
        for group in self.optimizer.param_groups:
            group["lr"] *= self._factor
        return True


def _mean_plus(values: Sequence[float], sigma_factor: float) -> float:
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / max(1, count - 1)
    return mean + sigma_factor * math.sqrt(variance)
