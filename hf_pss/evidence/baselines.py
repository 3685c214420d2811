"""The optimizers of a sweep and of its guards, all with the same groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from hf_pss.errors import ConfigurationError, how_to_install
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.optim import MatrixOptimizer
from hf_pss.optim.layout import layout_of

TRAINERS_OWN = "trainer"
"""The optimizer name with which a cell leaves the choice to the Trainer, whose default is AdamW."""

Groups: TypeAlias = list[dict[str, Any]]


OptimizerMaker: TypeAlias = Callable[[nn.Module, TrainingArguments], Optimizer]

# The Trainer's patterns, and one for the gains of σReparam, which are not weights.
_WITHOUT_DECAY = ["bias", "layernorm", "rmsnorm", r"ln_\d", r"(?:^|\.)norm(?:$|\.)", r"\.gain$"]


def decay_groups(model: nn.Module, args: TrainingArguments) -> Groups:
    """Return the parameters with weight decay, and those without it: biases, norms and gains."""
    decayed, plain = _split(model)
    return [
        {"params": list(decayed.values()), "weight_decay": args.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]


def matrix_groups(
    model: nn.Module, args: TrainingArguments, *, matrix_lr_ratio: float = 1.0
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
    rate, decay = args.learning_rate, args.weight_decay
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


def _adam(args: TrainingArguments) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _adamw(groups: Groups, args: TrainingArguments) -> Optimizer:
    return torch.optim.AdamW(groups, **_adam(args))


def _sgd(groups: Groups, args: TrainingArguments) -> Optimizer:
    return torch.optim.SGD(groups, lr=args.learning_rate, momentum=_SGD_MOMENTUM, nesterov=True)


def _muon(groups: Groups, args: TrainingArguments) -> Optimizer:
    matrices, *others = groups
    return MatrixOptimizer(
        [{**matrices, "algo": "muon"}, *({**group, "algo": "adamw"} for group in others)],
        **_adam(args),
    )


def _pytorch_optimizer_muon(groups: Groups, args: TrainingArguments) -> Optimizer:
    matrices, *others = groups
    # This is Moonlight's scale, 0.2 sqrt(max(m, n)). It is also the default of our Muon.
    return _packaged(
        "Muon",
        [{**matrices, "use_muon": True}]
        + [{**g, "use_muon": False, **_adam(args)} for g in others],
        use_adjusted_lr=True,
    )


def _packaged(name: str, groups: Groups, **options: Any) -> Optimizer:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigurationError(
            f"The optimizer {name} comes from pytorch_optimizer. "
            f"{how_to_install('pytorch_optimizer')}"
        ) from error
    optimizer: Optimizer = getattr(pytorch_optimizer, name)(groups, **options)
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[Groups, TrainingArguments], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "muon": _muon,
    "pytorch_optimizer_muon": _pytorch_optimizer_muon,
}
"""SGD has Nesterov momentum 0.9. Both Muons use AdamW for everything but block matrices."""


def make_optimizer(
    name: str, model: nn.Module, args: TrainingArguments, *, matrix_lr_ratio: float = 1.0
) -> Optimizer:
    """Return the optimizer of a name in `OPTIMIZERS` for a model.

    Raises:
        ConfigurationError: Its package is not installed.
    """
    groups = matrix_groups(model, args, matrix_lr_ratio=matrix_lr_ratio)
    return OPTIMIZERS[name](groups, args)


# ---- optimizers that are guards ----


def reparametrized_adamw(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """AdamW, with σReparam's gains among the parameters without weight decay."""
    return torch.optim.AdamW(decay_groups(model, args), lr=args.learning_rate, **_adam(args))


def packaged_adam(name: str, **options: Any) -> OptimizerMaker:
    """Return the maker of an optimizer of pytorch_optimizer that takes AdamW's place."""

    def make(model: nn.Module, args: TrainingArguments) -> Optimizer:
        groups = decay_groups(model, args)
        return _packaged(name, groups, lr=args.learning_rate, **_adam(args), **options)

    return make
