"""The optimizers of a sweep and of its guards, all with the same groups of parameters."""

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
    "adagc",
    "decay_groups",
    "make_optimizer",
    "matrix_groups",
    "reparametrized_adamw",
    "spam",
    "stable_adamw",
    "stable_spam",
]

TRAINERS_OWN = "trainer"
"""The optimizer name with which a cell leaves the choice to the Trainer, whose default is AdamW."""

Groups: TypeAlias = list[dict[str, Any]]

# The Trainer's patterns, and one for the gains of σReparam, which are not weights.
_WITHOUT_DECAY = ["bias", "layernorm", "rmsnorm", r"ln_\d", r"(?:^|\.)norm(?:$|\.)", r"\.gain$"]


def decay_groups(model: nn.Module, settings: OptimizerSettings) -> Groups:
    """Return the parameters with weight decay, and those without it: biases, norms and gains."""
    decayed, plain = _split(model)
    return [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]


def matrix_groups(
    model: nn.Module, settings: OptimizerSettings, *, matrix_lr_ratio: float = 1.0
) -> Groups:
    """Return the block matrices, the other parameters with weight decay, and those without it.

    The group of the matrices also describes their layout in the parameters. Most optimizers ignore
    that description.
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
    matrices, *others = groups
    # This is Moonlight's scale, 0.2 sqrt(max(m, n)). It is also the default of our Muon.
    return _packaged(
        "Muon",
        [{**matrices, "use_muon": True}]
        + [{**g, "use_muon": False, "betas": settings.betas, "eps": settings.eps} for g in others],
        use_adjusted_lr=True,
    )


def _packaged(name: str, groups: Groups, **options: Any) -> Optimizer:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigurationError(
            f"The optimizer {name} comes from pytorch_optimizer: pip install 'hf-pss[evidence]'."
        ) from error
    optimizer: Optimizer = getattr(pytorch_optimizer, name)(groups, **options)
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[Groups, OptimizerSettings], Optimizer]] = MappingProxyType(
    {
        "adamw": _adamw,
        "sgd": _sgd,
        "muon": _muon,
        "pytorch_optimizer_muon": _pytorch_optimizer_muon,
    }
)
"""SGD has Nesterov momentum 0.9. Both Muons use AdamW for everything but block matrices."""


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


# ---- optimizers that are guards ----


def adagc(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW with each tensor's gradient held to 1.05 times the average of its clipped norms.

    arXiv 2502.11034 with β = 0.98 and λ_rel = 1.05. For the first 100 steps it clips globally at
    λ_abs = 1, and the smallest norm so far serves as the average. These numbers are the
    package's defaults.
    """
    return _replacement("AdaGC", model, settings)


def spam(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Adam that limits entries to g² ≤ 5000 v and resets its moments every 500 steps.

    arXiv 2501.06842 with a cosine warm-up of 150 steps after a reset (the package's default is 50)
    and full density, which means no sparse momentum. The package does not restart Adam's bias
    correction at a reset. After a reset it limits entries only from the 20th step on.
    """
    return _replacement("SPAM", model, settings, warmup_epoch=150)


def stable_spam(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Adam with resets, on gradients whose entries and norm have adaptive limits.

    arXiv 2502.17055 with γ₁ = 0.7, γ₂ = 0.9, θ = 0.999 and a reset of the moments every 1000 steps.
    These numbers are the package's defaults.
    """
    return _replacement("StableSPAM", model, settings)


def stable_adamw(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW that divides the learning rate of each tensor by max(1, RMS(g/√v)).

    arXiv 2304.13013, algorithm 2, whose average corrects v for its bias. This optimizer also
    divides the learning rate in the weight decay.
    """
    return _replacement("StableAdamW", model, settings)


def reparametrized_adamw(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """AdamW, with σReparam's gains among the parameters without weight decay."""
    return torch.optim.AdamW(
        decay_groups(model, settings),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def _replacement(
    name: str, model: nn.Module, settings: OptimizerSettings, **options: Any
) -> Optimizer:
    numbers = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    return _packaged(name, decay_groups(model, settings), **numbers, **options)
