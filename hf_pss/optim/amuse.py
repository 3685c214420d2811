"""AMUSE: Muon inside schedule-free, with no learning rate to decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed import local
from hf_pss.optim.optimizer import MatrixOptimizer

__all__ = ["Amuse", "interpolation"]

_BASE = "z"
"""The state's key; that of schedule-free optimizers elsewhere."""

_OWN: Mapping[str, Any] = {
    "beta1": 0.9,
    "rho": 1.0,
    "warmup_steps": 0,
    "iteration": 0,
    "weight_sum": 0.0,
    "lr_max": 0.0,
    "train_mode": True,
}
"""Entries of a group beside those of `MatrixOptimizer`: options, then where the averaging is."""


def interpolation(step: int, *, beta1: float, rho: float, warmup_steps: int) -> float:
    """Return β_t: how far the point of gradient t lies towards the average.

    β₁ until the end of warm-up, T₀, then 1 − ((T₀ − 1)/(t − 1))^ρ (1 − β₁), which tends to 1.

    Args:
        step: t, counted from 1.
        beta1: β₁.
        rho: ρ.
        warmup_steps: T₀; 0: β₁ throughout.

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

    With D the direction of a group's rule, its momentum fed by gradients taken at y:

        y_t = (1 − β_t) z_t + β_t x_t
        z_{t+1} = (1 − η λ) z_t − η D
        x_{t+1} = (1 − c) x_t + c z_{t+1}

    and β_t from `interpolation`. A parameter holds y while training and x after `eval`; the state
    holds z, and x is found again as z + (y − z)/β. Evaluate and save between `eval` and `train`:
    `ScheduleFreeCallback` does so in a Trainer.

    c = w_t / Σ_{i ≤ t} w_i with w_t = (the highest η so far)², the weights of Schedule-Free AdamW
    (Defazio et al. 2024, arXiv 2405.15682): 1/t at a constant rate. The paper prints 1/(t + 1),
    which counts the starting point, too; its authors' program squares the rate of the step itself,
    which is the same as long as the rate does not decay.

    Decay is of z, and groups of ``algo="adamw"`` take Schedule-Free AdamW's direction, a gradient
    over √v̂ without a first moment, both as in the authors' program. That program makes y_{t+1} with
    β_t and takes it apart with β_{t+1}; here both are β_{t+1}, as the paper's first line has it.

    x is as exact as y and z are stored. Bfloat16 parameters lose steps to rounding with every
    optimizer; here the average, which moves by small parts, loses more: after 300 steps on noise at
    η = 0.002, x had gone astray by 0.49 of its way, z by 0.37. Keep parameters in float32, and let
    autocast do the rest.

    All parameters of a group share t. One that has no gradient in a step keeps its x and z, and its
    y follows β (ours).

    Args:
        params: Parameter groups, each with ``algo``; see `MatrixOptimizer`.
        beta1: β₁, in (0, 1]; at 0 y would not tell x.
        rho: ρ, 0 or more.
        warmup_steps: T₀, the steps over which a scheduler raises η; 0: β₁ throughout (ours), which
            is plain schedule-free. At 1 the formula would have gradients at x from the second step.
        options: Those of `MatrixOptimizer`. Of ``betas``, only the second has a use here.

    Raises:
        ConfigurationError: A number out of range.
    """

    _own = _OWN

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
        """Add a group; its iterates start at its parameters."""
        for name, value in self._own.items():  # a copy has its defaults, and nothing else of ours
            self.defaults.setdefault(name, value)
        group = {**self.defaults, **param_group}
        beta1, rho, warmup_steps = (group[name] for name in ("beta1", "rho", "warmup_steps"))
        if not 0 < beta1 <= 1 or not rho >= 0 or warmup_steps < 0 or warmup_steps == 1:
            raise ConfigurationError(
                f"You gave beta1={beta1}, rho={rho}, warmup_steps={warmup_steps}; beta1 is in "
                "(0, 1], rho 0 or more, and warmup_steps 0 or at least 2."
            )
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, also of an optimizer that keeps no average: one starts at the weights."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in _OWN:
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def train(self) -> None:
        """Put y into the parameters, where gradients are taken; nothing if it is there."""
        self._switch(is_training=True)

    @torch.no_grad()
    def eval(self) -> None:
        """Put x into the parameters, to evaluate and to save; nothing if it is there."""
        self._switch(is_training=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Raises:
            ConfigurationError: The parameters hold x.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise ConfigurationError(
                "The parameters hold the averaged weights, where no gradient is to be taken: call "
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
        zs = [self._base(p) for p in params]
        self._towards_z_(params, 1.0 - 1.0 / _beta(group, 0))  # y becomes x
        super()._move_(zs, directions, group)
        # Towards z by c, which makes the new x, and from there by 1 − β: one interpolation. A rate
        # that was 0 so far has moved nothing, and there is nothing to average.
        c = group["lr_max"] ** 2 / group["weight_sum"] if group["lr_max"] else 0.0
        self._towards_z_(params, 1.0 - (1.0 - c) * _beta(group, 1))

    def _step_others(self, group: dict[str, Any], held: Sequence[int]) -> None:
        _count_(group)
        params = [group["params"][i] for i in held]
        seconds = [local(self._zeros(p, "exp_avg_sq")) for p in params]
        steps = [self._count_on(p) for p in params]
        beta2 = group["betas"][1]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, value=1.0 - beta2)
        roots = torch._foreach_div(seconds, [1.0 - beta2**t for t in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        self._move_(params, torch._foreach_div(gradients, roots), group)

    def _base(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if _BASE not in state:
            state[_BASE] = parameter.detach().clone(memory_format=torch.preserve_format)
        found: Tensor = state[_BASE]
        return found

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
    """Move on what the weights of the average are made of."""
    group["iteration"] += 1
    group["lr_max"] = max(group["lr_max"], float(group["lr"]))
    group["weight_sum"] += group["lr_max"] ** 2


def _beta(group: dict[str, Any], ahead: int) -> float:
    """Return β of the group's iteration, or of the next, whose y the parameters hold after it."""
    return interpolation(
        max(group["iteration"] + ahead, 1),
        beta1=group["beta1"],
        rho=group["rho"],
        warmup_steps=group["warmup_steps"],
    )
