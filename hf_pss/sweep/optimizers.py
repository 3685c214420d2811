"""The optimizers of a sweep, each over the same groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.errors import ConfigurationError
from hf_pss.optim import MatrixOptimizer
from hf_pss.sweep.groups import Groups, matrix_groups
from hf_pss.sweep.guards.base import OptimizerSettings

__all__ = ["OPTIMIZERS", "make_optimizer"]

_SGD_MOMENTUM = 0.9


def _adamw(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)


def _sgd(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=_SGD_MOMENTUM, nesterov=True)


def _muon(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    matrices, *others = groups
    return MatrixOptimizer(
        [{**matrices, "algo": "muon"}, *({**group, "algo": "adamw"} for group in others)],
        betas=settings.betas,
        eps=settings.eps,
    )


def _pytorch_optimizer_muon(groups: Groups, settings: OptimizerSettings) -> Optimizer:
    try:
        from pytorch_optimizer import Muon
    except ImportError as error:
        raise ConfigurationError(
            "The optimizer pytorch_optimizer_muon of a sweep needs that package: "
            "pip install 'hf-pss[evidence]'."
        ) from error
    matrices, *others = groups
    # Moonlight's scale 0.2 sqrt(max(m, n)), as ours by default.
    optimizer: Optimizer = Muon(
        [{**matrices, "use_muon": True}]
        + [{**g, "use_muon": False, "betas": settings.betas, "eps": settings.eps} for g in others],
        use_adjusted_lr=True,
    )
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[Groups, OptimizerSettings], Optimizer]] = MappingProxyType(
    {
        "adamw": _adamw,
        "sgd": _sgd,
        "muon": _muon,
        "pytorch_optimizer_muon": _pytorch_optimizer_muon,
    }
)
"""SGD has Nesterov momentum 0.9; both of Muon give AdamW all that is no block matrix."""


def make_optimizer(
    name: str, model: nn.Module, settings: OptimizerSettings, *, matrix_lr_ratio: float = 1.0
) -> Optimizer:
    """Return the optimizer of that name for a model.

    Raises:
        ConfigurationError: The name is unknown, or its package is not installed.
    """
    if name not in OPTIMIZERS:
        raise ConfigurationError(
            f"You asked for the optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}."
        )
    groups = matrix_groups(model, settings, matrix_lr_ratio=matrix_lr_ratio)
    return OPTIMIZERS[name](groups, settings)
