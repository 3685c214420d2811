"""Guards that are optimizers in AdamW's place, from the package pytorch_optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.baselines import decay_groups
from hf_pss.evidence.guards.base import OptimizerSettings

__all__ = [
    "adagc",
    "reparametrized_adamw",
    "spam",
    "stable_adamw",
    "stable_spam",
]


def adagc(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW with each tensor's gradient held to 1.05 times the average of its clipped norms.

    arXiv 2502.11034: β = 0.98, λ_rel = 1.05; over 100 steps global clipping at λ_abs = 1, while the
    average is the least norm seen. All of it is the package's default.
    """
    return _packaged("AdaGC", model, settings)


def spam(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Adam with entries held to g² ≤ 5000 v and its moments reset every 500 steps.

    arXiv 2501.06842: cosine warm-up of 150 steps after a reset, where the package has 50 by
    default; full density (no sparse momentum). The package does not restart Adam's bias correction
    at a reset, and judges entries only from the 20th step after one.
    """
    return _packaged("SPAM", model, settings, warmup_epoch=150)


def stable_spam(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Adam on gradients with an adaptive limit of entries and an adaptive norm, with resets.

    arXiv 2502.17055: γ₁ = 0.7, γ₂ = 0.9, θ = 0.999, moments reset every 1000 steps; the package's
    defaults.
    """
    return _packaged("StableSPAM", model, settings)


def stable_adamw(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW whose learning rate is divided, tensor by tensor, by max(1, RMS(g/√v)).

    arXiv 2304.13013, algorithm 2: v is corrected for its bias within the average. The learning rate
    of the weight decay is divided, too.
    """
    return _packaged("StableAdamW", model, settings)


def reparametrized_adamw(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW itself; σReparam's gains are among the parameters without decay."""
    return AdamW(
        decay_groups(model, settings),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def _packaged(
    name: str, model: nn.Module, settings: OptimizerSettings, **options: Any
) -> Optimizer:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigurationError(
            f"The guard's optimizer {name} is pytorch_optimizer's: pip install 'hf-pss[evidence]'."
        ) from error
    optimizer: Optimizer = getattr(pytorch_optimizer, name)(
        decay_groups(model, settings),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        **options,
    )
    return optimizer
