"""AMUSE as the paper writes it: three sequences, all kept (arXiv 2605.22432)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ReferenceAmuse"]


@dataclass(slots=True)
class ReferenceAmuse:
    """AMUSE on one matrix; `gradient_point` is where the next gradient belongs.

    Attributes:
        x: (m, n), the average.
        z: (m, n), the base sequence.
        direction: D of the momentum: for Muon, s · UVᵀ of its SVD.
        momentum: μ.
        nesterov: Whether D sees μ M + (1 − μ) G instead of M.
        weight_decay: λ.
        beta1: β₁.
        rho: ρ.
        warmup_steps: T₀; 0: β₁ throughout.
        t: The step that comes next, from 1.
        m: (m, n), M; none before the first step.
        weight_sum: Σ w_i; see `hf_pss.optim.amuse.Amuse` for w.
        lr_max: The highest η so far.
    """

    x: Tensor
    z: Tensor
    direction: Callable[[Tensor], Tensor]
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    beta1: float = 0.9
    rho: float = 1.0
    warmup_steps: int = 0
    t: int = 1
    m: Tensor | None = None
    weight_sum: float = 0.0
    lr_max: float = 0.0

    def beta(self) -> float:
        """Return β_t."""
        t, t0 = self.t, self.warmup_steps
        if t0 == 0 or t <= t0:
            return self.beta1
        beta: float = 1 - ((t0 - 1) / (t - 1)) ** self.rho * (1 - self.beta1)
        return beta

    def gradient_point(self) -> Tensor:
        """Return y_t = (1 − β_t) z_t + β_t x_t."""
        beta = self.beta()
        return (1 - beta) * self.z + beta * self.x

    def step(self, gradient: Tensor, lr: float) -> None:
        """Make step t with the gradient at y_t.

        Args:
            gradient: (m, n).
            lr: η.
        """
        m = torch.zeros_like(gradient) if self.m is None else self.m
        self.m = m = self.momentum * m + (1 - self.momentum) * gradient
        seen = self.momentum * m + (1 - self.momentum) * gradient if self.nesterov else m
        self.z = (1 - lr * self.weight_decay) * self.z - lr * self.direction(seen)
        self.lr_max = max(self.lr_max, lr)
        self.weight_sum += self.lr_max**2
        c = self.lr_max**2 / self.weight_sum if self.lr_max else 0.0
        self.x = (1 - c) * self.x + c * self.z
        self.t += 1
