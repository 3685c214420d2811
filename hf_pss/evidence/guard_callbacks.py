"""Guards that act through a callback: on the gradients, on the weights, or once after a fault."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState

from hf_pss.detection.detectors import Verdict
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.recipes import Fault
from hf_pss.linalg import (
    SMOOTHING_FUNCTIONS,
    SmoothingFunction,
    StableRankCap,
    noise_stable_rank,
)
from hf_pss.models.batching import stacks, write_stack_
from hf_pss.models.distributed import Backend, backend_for
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.models.smoother import FIRST_MOMENTS, smooth_matrices_
from hf_pss.records.events import Intervention
from hf_pss.trainer.callback import PSSCallback


class TimedCallback(TrainerCallback):
    """A callback that acts around every step, and records its time and the steps it changed.

    A subclass overrides some of `prepare`, `before_step`, `before_update` and `after_step`.
    """

    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: Any

    def __init__(self) -> None:
        self.intervention_steps: list[int] = []
        """Steps, from 1, at which something was changed."""
        self.seconds = 0.0
        """Total time in this callback, including the steps without a change."""

    def prepare(self) -> None:
        """Get ready. This is called once, when training begins."""

    def before_step(self, step: int) -> None:
        """Act before the forward pass of a step."""

    def before_update(self) -> bool:
        """Act on the gradients, and return whether something was changed."""
        return False

    def after_step(self, step: int) -> bool:
        """Act after the optimizer's update, and return whether something was changed."""
        return False

    # ---- the Trainer's events ----

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the objects of the run, and call `prepare`."""
        self.model, self.lr_scheduler = kwargs["model"], kwargs["lr_scheduler"]
        optimizer = kwargs["optimizer"]
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        started = time.perf_counter()
        self.prepare()
        self.seconds += time.perf_counter() - started

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Call `before_step` and measure its time."""
        started = time.perf_counter()
        self.before_step(state.global_step + 1)
        self.seconds += time.perf_counter() - started

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Call `before_update` and measure its time."""
        self._act(self.before_update, state.global_step + 1)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Call `after_step` and measure its time."""
        self._act(lambda: self.after_step(state.global_step), state.global_step)

    def _act(self, act: Callable[[], bool], step: int) -> None:
        started = time.perf_counter()
        has_acted = act()
        self.seconds += time.perf_counter() - started
        if has_acted:
            self.intervention_steps.append(step)


# ---- guards that judge the gradient's norm ----

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

    def __init__(self, rule: ZClipRule) -> None:
        super().__init__()
        self.rule = rule

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
        values = zip(self._windows, (loss, grad_norm), strict=True)
        return any([self._is_outlier(window, value) for window, value in values])  # reads both

    def _is_outlier(self, window: deque[float], value: float) -> bool:
        if not math.isfinite(value):
            return True
        limit, count = math.inf, len(window)
        # OLMo-core counts the value itself: with the 63 values before it there are 64.
        if count + 1 >= self._minimum:
            mean = sum(window) / count
            variance = sum((v - mean) ** 2 for v in window) / max(1, count - 1)
            limit = mean + self._sigma_factor * math.sqrt(variance)
        window.append(value)
        return value > limit


class OlmoSkipStep(TimedCallback):
    """Drops the gradients of a step by `SkipStepRule`.

    OLMo-core multiplies the update by zero, so a NaN stays NaN. Here the optimizer skips the
    parameters. Its moments keep their values in both.
    """

    def __init__(self, pss: PSSCallback) -> None:
        super().__init__()
        self._pss = pss
        self.rule = SkipStepRule()

    def before_update(self) -> bool:
        """Judge the loss and the norm before clipping."""
        loss, norm = (math.nan if value is None else value for value in self._pss.readings)
        if not self.rule.skips(loss, norm):
            return False
        for parameter in self.model.parameters():
            parameter.grad = None
        return True


class LearningRateDrop(TimedCallback):
    """Halves the learning rate for the rest of the run where PSS would have smoothed.

    Args:
        pss: A callback that observes with the trigger of the preset ``paper``. It must come
            before this callback.
        cooldown_steps: Steps after a drop during which no further drop may happen. PSS counts its
            cooldown in the same way.
    """

    def __init__(self, pss: PSSCallback, *, cooldown_steps: int = 10) -> None:
        super().__init__()
        self._pss = pss
        self._cooldown_steps = cooldown_steps

    def after_step(self, step: int) -> bool:
        """Lower the rate after a step that PSS judges a spike."""
        report, past = self._pss.report, self.intervention_steps
        is_cooling_down = bool(past) and step - past[-1] <= self._cooldown_steps
        if report is None or report.verdict is not Verdict.SPIKE or is_cooling_down:
            return False
        # The scheduler computes the rate of every later step from these.
        self.lr_scheduler.base_lrs = [rate * 0.5 for rate in self.lr_scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5
        return True


# ---- guards on the weights, at every step or on a schedule ----

REPARAMETRIZED = r"parametrizations\.weight\.original$"
"""Matches the names of the matrices after `sigma_reparam_`."""


class _Gain(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = self.gain * weight
        return scaled


@torch.no_grad()
def sigma_reparam_(model: nn.Module, *, gain: float = 0.0) -> None:
    """Write every selected weight as Ŵ = γ W/σ₁(W) with a learned γ (σReparam, arXiv 2303.06296).

    A fused projection counts as one matrix with one γ. torch's `spectral_norm` estimates σ₁ with
    one round of power iteration per forward pass. γ starts at ``gain``. With 0 it starts at σ₁,
    so the model is at first the same function as without the guard. The authors' code
    (github.com/apple/ml-sigma-reparam) starts at σ₁ for images and at 1 for speech.

    Raises:
        ConfigurationError: A selected parameter is not the weight of a module.
    """
    names = dict.fromkeys(view.parameter_name for view in select_matrices(model).matrices)
    for name in names:
        if not name.endswith(".weight"):
            raise ConfigurationError(
                f"sigma_reparam changes modules with a weight, and {name} is a stack of matrices: "
                "leave this guard out for this recipe."
            )
        module: Any = model.get_submodule(name.rpartition(".")[0])
        u, sigma, vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        # spectral_norm draws from torch's global generator, which must not change the data's order.
        with torch.random.fork_rng(devices=[]):
            parametrizations.spectral_norm(module, "weight")
        norm = module.parametrizations.weight[0]
        norm._u.copy_(u[:, 0])
        norm._v.copy_(vh[0])
        start = torch.full_like(sigma[0], gain) if gain else sigma[0].clone()
        parametrize.register_parametrization(module, "weight", _Gain(start))


# Rounds of power iteration per step, and in the first step.
_ROUNDS, _FIRST_ROUNDS = 2, 30


class MatrixCallback(TimedCallback):
    """A callback with the selected matrices of the model that it trains."""

    views: tuple[MatrixView, ...] = ()

    def prepare(self) -> None:
        """Select the matrices that PSS would select."""
        self.views = select_matrices(self.model).matrices

    def stored(self) -> tuple[dict[str, nn.Parameter], Backend]:
        """Return the parameters as they are now, and the backend that reads them."""
        parameters = named_parameters_canonical(self.model)
        return parameters, backend_for(parameters)

    def smooth(
        self, smoothing: Callable[[Sequence[str]], SmoothingFunction], *, max_rank: int
    ) -> None:
        """Smooth every selected matrix, at most `max_rank` singular values of each."""
        smooth_matrices_(self.views, *self.stored(), smoothing, max_rank=max_rank)


class ScheduledSmoothing(MatrixCallback):
    """Smooths all selected matrices every P steps, or at random steps with the same mean interval.

    Args:
        smoothing: Name of a smoothing function; ``polar`` is MSign's reset.
        every_steps: The interval P.
        random_seed: Seed of the guard's own generator, with which it smooths at each step with
            probability 1/P. With None it smooths every P steps.
        max_rank: Largest number of singular values that move in a matrix; `polar` moves all.
    """

    def __init__(
        self,
        smoothing: str,
        *,
        every_steps: int = 100,
        random_seed: int | None = None,
        max_rank: int = 32,
    ) -> None:
        super().__init__()
        self._smoothing = SMOOTHING_FUNCTIONS[smoothing]
        self._every_steps = every_steps
        self._max_rank = max_rank
        self._dice = None
        if random_seed is not None:
            self._dice = torch.Generator().manual_seed(random_seed)

    def after_step(self, step: int) -> bool:
        """Smooth if the step is due."""
        if not self._is_due(step):
            return False
        self.smooth(lambda names: self._smoothing(), max_rank=self._max_rank)
        return True

    def _is_due(self, step: int) -> bool:
        if self._dice is None:
            return step % self._every_steps == 0
        return torch.rand((), generator=self._dice).item() < 1 / self._every_steps


class SpectralCap(MatrixCallback):
    """After every update it sets W ← W·min(1, β/σ₁) with β = `factor`·(1 + √(m/n)).

    The level is [ours]. 1 + √(m/n) is the spectral edge of i.i.d. noise of variance 1/n with n
    inputs. Such noise keeps the size of its input, so the scale of the initial weights does not
    matter. Power iteration estimates σ₁ from below, with two rounds per step that start from the
    vectors of the last step (Miyato et al. 2018, arXiv 1802.05957). At width 16 and a learning rate
    of 1e-2 we measured σ₁ at most 1.3 % over the cap.
    """

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self._factor = factor
        self._vectors: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Scale down every matrix that has grown beyond its cap."""
        parameters, backend = self.stored()
        has_acted = False
        for stack in stacks(self.views, parameters, backend):
            sigma = self._spectral_norms(stack.names, stack.matrices)
            m, n = stack.matrices.shape[-2:]
            scale = self._factor * (1 + math.sqrt(m / n)) / sigma
            # There is one device-to-host read per shape. NaN compares false, so a matrix with NaN
            # stays as it is.
            changed = (scale < 1).tolist()
            scaled = stack.matrices * scale[:, None, None]
            write_stack_(stack, scaled, changed, parameters, backend)
            has_acted |= any(changed)
        return has_acted

    def _spectral_norms(self, names: tuple[str, ...], weight: Tensor) -> Tensor:
        v, num_rounds = self._vectors.get(names), _ROUNDS
        if v is None or not bool(v.isfinite().all()):
            generator = torch.Generator().manual_seed(0)
            v = torch.randn(weight.shape[-1], 1, generator=generator).to(weight)
            v, num_rounds = v.expand(len(names), -1, -1), _FIRST_ROUNDS
        for _ in range(num_rounds):
            v = nn.functional.normalize(weight.mT @ (weight @ v), dim=-2)
        self._vectors[names] = v
        sigma: Tensor = torch.linalg.vector_norm(weight @ v, dim=(-2, -1))
        return sigma


class NormCap(MatrixCallback):
    """After every update it sets W ← W·min(1, c‖W₀‖_F/‖W‖_F) with c = `factor` [ours].

    So ‖W‖_F never exceeds c times its initial value ‖W₀‖_F. The direction of W is free, and its
    stable rank does not change. A matrix that starts at zero is left alone.
    """

    def __init__(self, *, factor: float = 2.0) -> None:
        super().__init__()
        self._factor = factor
        self._starts: list[Tensor] = []

    @torch.no_grad()
    def prepare(self) -> None:
        """Measure the norms at the start."""
        super().prepare()
        stored = self.stored()
        self._starts = [_frobenius(stack.matrices) for stack in stacks(self.views, *stored)]

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Scale down every matrix that has grown beyond its cap."""
        stored, has_acted = self.stored(), False
        for stack, start in zip(stacks(self.views, *stored), self._starts, strict=True):
            scale = self._factor * start / _frobenius(stack.matrices)
            changed = ((scale < 1) & (start > 0)).tolist()  # one device-to-host read per shape
            write_stack_(stack, stack.matrices * scale[:, None, None], changed, *stored)
            has_acted |= any(changed)
        return has_acted


def _frobenius(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return norms


class Assr(MatrixCallback):
    """Adds ASSR's penalty to the loss (github.com/xfdbv99pqh-jpg/ASSR, version 1.5.0 of its code).

    In every step it draws a tenth of the matrices. A matrix is penalised if its stable rank is
    below F·min(m, n), or else if its condition number κ is above C. The penalty is
    λ(1 + 10 s)‖W‖_F², where s ≤ 1 is 1 − SR/(F·min(m, n)) or (κ/C − 1)/10. It shrinks W and does
    not by itself raise the stable rank.

    ASSR draws from all modules of the class ``nn.Linear``, which in GPT-2 is the head alone, and
    measures a part of large matrices. Here it draws from the matrices that PSS selects, and
    measures whole matrices [ours].

    Args:
        base_lambda: λ.
        floor: F.
        ceiling: C.
        seed: Seed of the guard's own generator.
    """

    def __init__(
        self,
        *,
        base_lambda: float = 1e-4,
        floor: float = 0.25,
        ceiling: float = 500.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._base_lambda, self._floor, self._ceiling = base_lambda, floor, ceiling
        self._dice = torch.Generator().manual_seed(seed)
        self._has_acted = False

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Initialise each gradient with the penalty's gradient.

        backward() then adds the gradient of the loss.
        """
        parameters, backend = self.stored()
        drawn = torch.randperm(len(self.views), generator=self._dice)[
            : max(1, len(self.views) // 10)
        ]
        views = [self.views[i] for i in drawn]
        gradients = {
            v.parameter_name: torch.zeros_like(parameters[v.parameter_name]) for v in views
        }
        self._has_acted = False
        for stack in stacks(views, parameters, backend):
            factor = self._factors(stack.matrices)
            changed = (factor > 0).tolist()
            penalty = 2 * factor[:, None, None] * stack.matrices
            write_stack_(stack, penalty, changed, gradients, backend)
            self._has_acted |= any(changed)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient

    def after_step(self, step: int) -> bool:
        """Return whether a matrix was penalised."""
        return self._has_acted

    def _factors(self, weight: Tensor) -> Tensor:
        """Return λ(1 + 10 s) of each matrix, or 0 if the matrix is healthy or broken."""
        is_finite = weight.isfinite().flatten(1).all(1)
        sigma = torch.linalg.svdvals(torch.where(is_finite[:, None, None], weight, 1.0))
        rank = sigma.square().mean(-1) / sigma[:, 0].square()
        excess = sigma[:, 0] / sigma[:, -1] / self._ceiling - 1
        severity = torch.where(rank < self._floor, 1 - rank / self._floor, excess / 10)
        is_ill = is_finite & ((rank < self._floor) | (excess > 0))
        return torch.where(is_ill, self._base_lambda * (1 + 10 * severity.clamp(max=1)), 0.0)


# ---- PSS's floor, on a schedule ----


class FloorSchedule(TimedCallback):
    """Multiplies the stable-rank floors of PSS by a factor that depends on the step.

    Args:
        pss: The callback whose floors it scales. It must come before this callback.
        factor: Returns the factor from the step, counted from 1, and from the learning rate of this
            step in units of the peak rate.
    """

    def __init__(self, pss: PSSCallback, factor: Callable[[int, float], float]) -> None:
        super().__init__()
        self._pss, self._factor = pss, factor
        self._last = 1.0

    def before_step(self, step: int) -> None:
        """Scale the floors if the factor has changed."""
        group = self.optimizer.param_groups[0]
        factor = self._factor(step, group["lr"] / group["initial_lr"])
        if factor != self._last and self._pss.controller is not None:
            self._pss.controller.scale_floors(factor)
            self._last = factor

    def after_step(self, step: int) -> bool:
        """Return whether PSS has changed weights in this step."""
        records = self._pss.report.records if self._pss.report is not None else ()
        return any(isinstance(r, Intervention) and r.has_changed_weights for r in records)


# ---- treatments after a fault at known steps ----

Treatment = Literal["smooth", "smooth_and_reset", "reset", "roll_back"]


class Rescue(MatrixCallback):
    """Treats a run once, right after the last step of its fault.

    Args:
        fault: The harmed steps.
        treatment: ``smooth`` caps every matrix at the stable-rank floor 0.8 · noise. ``reset`` sets
            the optimizer's first moments to zero, and ``smooth_and_reset`` does both.
            ``roll_back`` restores the weights and the optimizer as they were before the fault, and
            continues with the next data.
    """

    def __init__(self, fault: Fault, treatment: Treatment) -> None:
        super().__init__()
        self._fault = fault
        self._treatment = treatment
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
            floors = {v.name: 0.8 * noise_stable_rank(*v.shape[-2:]) for v in self.views}
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
