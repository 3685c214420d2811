"""How parameters are grouped: the same for every optimizer that a sweep compares.

The optimizers of a sweep, each over the same groups of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.guards.base import OptimizerSettings
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.optim import MatrixOptimizer
from hf_pss.optim.layout import layout_of

__all__ = [
    "OPTIMIZERS",
    "TRAINERS_OWN",
    "Groups",
    "decay_groups",
    "make_optimizer",
    "matrix_groups",
]

TRAINERS_OWN = "trainer"
"""Name of a cell's optimizer that leaves the choice to the Trainer: its default AdamW."""

Groups: TypeAlias = list[dict[str, Any]]

# Of transformers' Trainer, and the gains of σReparam, which are no weights.
_WITHOUT_DECAY = ["bias", "layernorm", "rmsnorm", r"ln_\d", r"(?:^|\.)norm(?:$|\.)", r"\.gain$"]


def decay_groups(model: nn.Module, settings: OptimizerSettings) -> Groups:
    """Return the parameters with weight decay, and those without: biases, norms and gains."""
    decayed, plain = _split(model)
    return [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]


def matrix_groups(
    model: nn.Module, settings: OptimizerSettings, *, matrix_lr_ratio: float = 1.0
) -> Groups:
    """Return block matrices, other parameters with weight decay, and those without.

    The matrices' group says how they lie in their parameters, which most optimizers pass over.
    """
    decayed, plain = _split(model)
    views: dict[str, list[MatrixView]] = {}
    for view in select_matrices(model).matrices:
        views.setdefault(view.parameter_name, []).append(view)
    matrices = [name for name in decayed if name in views]
    others = [p for name, p in decayed.items() if name not in views]
    rate, decay = settings.learning_rate, settings.weight_decay
    return [
        {
            "params": [decayed[name] for name in matrices],
            "layouts": [layout_of(views[name]) for name in matrices],
            "lr": rate * matrix_lr_ratio,
            "weight_decay": decay,
        },
        {"params": others, "lr": rate, "weight_decay": decay},
        {"params": list(plain.values()), "lr": rate, "weight_decay": 0.0},
    ]


def _split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    names = set(get_parameter_names(model, [nn.LayerNorm], _WITHOUT_DECAY))
    trained = {n: p for n, p in named_parameters_canonical(model).items() if p.requires_grad}
    decayed = {name: p for name, p in trained.items() if name in names}
    return decayed, {name: p for name, p in trained.items() if name not in names}


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
