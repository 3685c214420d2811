"""How parameters are grouped: the same for every optimizer that a sweep compares."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from hf_pss.optim.layout import layout_of
from hf_pss.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.sweep.guards.base import OptimizerSettings

__all__ = ["Groups", "decay_groups", "matrix_groups"]

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
