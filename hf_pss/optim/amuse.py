"""AMUSE: Muon with schedule-free averaging, which needs no decay of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed import local
from hf_pss.optim.optimizer import MatrixOptimizer

_BASE = "z"
"""The key of z in the state. Other schedule-free optimizers use the same key."""

_OWN: Mapping[str, Any] = {
    "beta1": 0.9,
    "rho": 1.0,
    "warmup_steps": 0,
    "iteration": 0,
    "weight_sum": 0.0,
    "lr_max": 0.0,
    "train_mode": True,
}
"""The entries that `Amuse` adds to a group of `MatrixOptimizer`. The options come first, then the
progress of the average."""


def interpolation(step: int, *, beta1: float, rho: float, warmup_steps: int) -> float:
    """Return β_t, the weight of the average x in the point y where gradient t is taken.

    β_t is β₁ until the end of warm-up at T₀. After that it is 1 − ((T₀ − 1)/(t − 1))^ρ (1 − β₁),
    which tends to 1.

    Args:
        step: t, counted from 1.
        beta1: β₁.
        rho: ρ.
        warmup_steps: T₀. If it is 0, the result is always β₁.

    Example:
        >>> [interpolation(t, beta1=0.9, rho=1.0, warmup_steps=3) for t in (1, 3, 5)]
        [0.9, 0.9, 0.95]
    """
    if step <= warmup_steps or warmup_steps == 0:
        return beta1
    distance: float = ((warmup_steps - 1) / (step - 1)) ** rho * (1.0 - beta1)
    return 1.0 - distance


class Amuse(MatrixOptimizer):
    """Schedule-free averaging around the rules of `MatrixOptimizer` (arXiv 2605.22432).

    Let D be the direction of the group's rule, whose momentum averages the
    gradients taken at y. Then:

        y_t = (1 − β_t) z_t + β_t x_t
        z_{t+1} = (1 − η λ) z_t − η D
        x_{t+1} = (1 − c) x_t + c z_{t+1}

    `interpolation` gives β_t. A parameter holds y during training and x after `eval`. The state
    holds z, and x is recovered as z + (y − z)/β. Call `eval` before you evaluate or save, and
    `train` afterwards. In a Trainer, `ScheduleFreeCallback` makes these calls.

    The weight c is w_t / Σ_{i ≤ t} w_i with w_t = (the highest η so far)². These are the weights of
    Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682). At a constant rate c is 1/t. The
    paper prints 1/(t + 1), which also counts the starting point. The authors' program squares the
    rate of the current step instead of the highest one, which gives the same weights as long as the
    rate does not decay.

    Two details follow the authors' program. Weight decay acts on z. Groups of ``algo="adamw"``
    use the direction of Schedule-Free AdamW, which is the gradient over √v̂ without a first
    moment. In one detail this class follows the first line of the paper instead: it uses
    β_{t+1} both to compute y_{t+1} and to recover x. The program computes y_{t+1} with β_t and
    recovers x with β_{t+1}.

    x is as exact as the stored y and z. Every optimizer loses small steps when it rounds to
    bfloat16 parameters. The average moves in small steps, so it loses more. After 300 steps on
    noise at η = 0.002, the error of x was 0.49 of the distance that x had moved. For z it was 0.37.
    Keep the parameters in float32, and use autocast.

    All parameters of a group share t. If a parameter has no gradient in a step, its x and z stay
    the same, and its y follows β (ours).

    Args:
        params: Parameter groups, each with ``algo``; see `MatrixOptimizer`.
        beta1: β₁, in (0, 1]. With 0, x could not be recovered from y.
        rho: ρ, 0 or more.
        warmup_steps: T₀, the number of steps over which a scheduler raises η. With 0, β_t is always
            β₁ (ours), which is plain schedule-free averaging. 1 is not allowed, because the formula
            would then take the gradients at x from the second step on.
        options: The options of `MatrixOptimizer`. Only the second of ``betas`` is used.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        beta1: float = 0.9,
        rho: float = 1.0,
        warmup_steps: int = 0,
        **options: Any,
    ) -> None:
        self._own = {**_OWN, "beta1": beta1, "rho": rho, "warmup_steps": warmup_steps}
        super().__init__(params, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its x, y and z start at the values of its parameters."""
        group = {**self.defaults, **param_group}
        beta1, rho, warmup_steps = (group[name] for name in ("beta1", "rho", "warmup_steps"))
        if not 0 < beta1 <= 1 or not rho >= 0 or warmup_steps < 0 or warmup_steps == 1:
            raise ConfigurationError(
                f"You gave beta1={beta1}, rho={rho}, warmup_steps={warmup_steps}; beta1 must "
                "be in (0, 1], rho 0 or more, and warmup_steps 0 or at least 2."
            )
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a state. If it contains no average, the average starts at the weights."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in _OWN:
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def train(self) -> None:
        """Put y, where gradients are taken, into the parameters, unless they already hold it."""
        self._switch(is_training=True)

    @torch.no_grad()
    def eval(self) -> None:
        """Put x into the parameters for evaluation and saving, unless they already hold it."""
        self._switch(is_training=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Raises:
            ConfigurationError: The parameters hold x.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise ConfigurationError(
                "The parameters hold the averaged weights, where no gradient may be taken. Call "
                "optimizer.train() after evaluating and saving, before the next forward pass."
            )
        loss = super().step(closure)
        for group in self.param_groups:
            still = [p for p in group["params"] if p.grad is None]
            if len(still) < len(group["params"]):
                self._towards_z_(still, 1.0 - _beta(group, 1) / _beta(group, 0))
        return loss

    def _step_matrices(self, group: dict[str, Any], held: Sequence[int]) -> None:
        _count_(group)
        super()._step_matrices(group, held)

    def _move_(
        self, params: Sequence[Tensor], directions: Sequence[Tensor], group: dict[str, Any]
    ) -> None:
        zs = [self._stored(p, _BASE, torch.clone) for p in params]
        self._towards_z_(params, 1.0 - 1.0 / _beta(group, 0))  # y becomes x
        super()._move_(zs, directions, group)
        # Moving towards z by c gives the new x, and moving on by 1 − β gives the new y.
        # One interpolation does both. If the rate has always been 0, nothing has moved,
        # so nothing is averaged.
        c = group["lr_max"] ** 2 / group["weight_sum"] if group["lr_max"] else 0.0
        self._towards_z_(params, 1.0 - (1.0 - c) * _beta(group, 1))

    def _step_others(self, group: dict[str, Any], held: Sequence[int]) -> None:
        _count_(group)
        params = [group["params"][i] for i in held]
        seconds = [local(self._stored(p, "exp_avg_sq")) for p in params]
        steps = [self._count_on(p) for p in params]
        beta2 = group["betas"][1]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, value=1.0 - beta2)
        roots = torch._foreach_div(seconds, [1.0 - beta2**t for t in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        self._move_(params, torch._foreach_div(gradients, roots), group)

    def _towards_z_(self, params: Iterable[Tensor], weight: float) -> None:
        moved = [p for p in params if _BASE in self.state.get(p, {})]
        if moved:
            bases = [local(self.state[p][_BASE]) for p in moved]
            torch._foreach_lerp_([local(p) for p in moved], bases, weight)

    def _switch(self, *, is_training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != is_training:
                beta = _beta(group, 1)
                self._towards_z_(group["params"], 1.0 - (beta if is_training else 1.0 / beta))
                group["train_mode"] = is_training


def _count_(group: dict[str, Any]) -> None:
    """Update the numbers from which the weights of the average are computed."""
    group["iteration"] += 1
    group["lr_max"] = max(group["lr_max"], float(group["lr"]))
    group["weight_sum"] += group["lr_max"] ** 2


def _beta(group: dict[str, Any], ahead: int) -> float:
    """Return β for ``ahead`` iterations from now. Between steps the y in the parameters uses 1."""
    return interpolation(
        max(group["iteration"] + ahead, 1),
        beta1=group["beta1"],
        rho=group["rho"],
        warmup_steps=group["warmup_steps"],
    )
