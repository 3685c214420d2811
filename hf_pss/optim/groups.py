"""Divide a model's parameters into groups, and build its optimizer."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from hf_pss.errors import ConfigurationError, check_choice
from hf_pss.models.distributed import backend_for
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.models.selection.heads import head_rows, is_of_heads
from hf_pss.models.selection.survey import survey
from hf_pss.optim.layout import Layout, by_head, is_by_head, layout_of, layouts_of_factors
from hf_pss.optim.optimizer import ADAMW, MatrixOptimizer
from hf_pss.optim.rules import RULES, rule_named

logger = logging.getLogger(__name__)

AMUSE = "amuse"

LR_RATIO = "matrix_lr_ratio"
# The options of `matrix_groups` and `MatrixOptimizer` that matter if AdamW moves everything.
_OF_ADAMW = ("include", "exclude", "no_decay", "lr", "weight_decay", "betas", "eps")


def matrix_groups(
    model: nn.Module,
    *,
    algo: str = "muon",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    no_decay: Collection[str] | None = None,
    others_lr: float | None = None,
    per_head: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the parameter groups: weight matrices for a rule, and the rest for AdamW.

    The first group holds the matrices that PSS selects, so the rule moves the same matrices that
    PSS smooths. Each factor of a LoRA adapter is a matrix (ours). The other parameters form two
    groups, one with weight decay and one without.

    Args:
        model: The model. Its trainable parameters are grouped, and frozen ones are left out.
        algo: A row of `RULES`, or ``adamw``.
        include: As in `select_matrices`.
        exclude: As in `select_matrices`.
        no_decay: Canonical names of parameters that AdamW moves without weight decay. If None,
            these are all parameters with fewer than two dimensions.
        others_lr: Learning rate of the other parameters. If None, they use the optimizer's rate.
        per_head: Whether to treat each head of a query, key or value projection, or of a gate
            beside the queries, as a separate matrix if its rows are known. Kimi K3, arXiv
            2607.24653, section 2.5, divides Q, K and V.
        options: Options of the group of matrices.

    Raises:
        SelectionError: The model has no matrix that could be selected, or a pattern matches none.
    """
    parameters = {n: p for n, p in named_parameters_canonical(model).items() if p.requires_grad}
    selection = select_matrices(model, include=include, exclude=exclude)
    views: dict[str, list[MatrixView]] = {}
    for view in selection.matrices:
        views.setdefault(view.parameter_name, []).append(view)
    layouts = {name: layout_of(found) for name, found in views.items()}
    if per_head:
        layouts |= _layouts_by_head(model, views, layouts)
    for adapter in selection.adapters:
        num_rows = parameters[adapter.right_name].shape[0]
        layouts |= layouts_of_factors(adapter, num_rows=num_rows)
    others = [name for name in parameters if name not in layouts]
    if no_decay is None:
        no_decay = {name for name in others if parameters[name].ndim < 2}
    rest = {"algo": ADAMW} if others_lr is None else {"algo": ADAMW, "lr": others_lr}
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in layouts],
            "algo": algo,
            "layouts": list(layouts.values()),
            **options,
        },
        {"params": [parameters[name] for name in others if name not in no_decay], **rest},
        {
            "params": [parameters[name] for name in others if name in no_decay],
            **rest,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _layouts_by_head(
    model: nn.Module, views: Mapping[str, Sequence[MatrixView]], layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """Return the layouts of projections with heads. Warn of projections with unknown heads."""
    found, unknown = {}, []
    for site in survey(model):
        held = views.get(site.name, ()) if site.tied_to is None else ()
        rows = head_rows(site, held) if held else None
        num_rows = sum(view.shape[-2] for view in held)
        # If parts of a fused projection are excluded, its layout has no parts.
        # It counts as one matrix.
        is_complete = bool(held) and (held[0].rows is None or bool(layouts[site.name][1]))
        if rows is not None and is_complete:
            layout = layouts[site.name]
            found[site.name] = by_head(layout, num_rows=num_rows, head_rows=rows)
        elif held and is_of_heads(site, held):
            unknown.append(site.name)
    if unknown and found:
        logger.warning(
            "per_head: the rows of the heads in %s are not known, so %s moved as without it.",
            unknown[0],
            "it is" if len(unknown) == 1 else f"it and {len(unknown) - 1} others are",
        )
    elif not found:
        logger.warning(
            "per_head has no effect: no selected projection of queries, keys or values has known "
            "heads."
        )
    return found


def build_optimizer(model: nn.Module, *, algo: str = "muon", **options: Any) -> MatrixOptimizer:
    """Return the optimizer of a model, and log its groups.

    A Trainer takes it as ``optimizer_cls_and_kwargs=(lambda: build_optimizer, {"algo": "muon"})``.

    Args:
        model: The model to train.
        algo: A row of `RULES`, ``amuse`` for `Amuse` with Muon's rule, or ``adamw`` for AdamW with
            a learning rate of their own for the matrices.
        options: The options of `matrix_groups`, of the rule, and of `MatrixOptimizer` or `Amuse`.
            With ``adamw``, those that concern AdamW, and ``matrix_lr_ratio``: the matrices move at
            this many times the rate ``lr``, above 0 and by default 1.

    Raises:
        ConfigurationError: An option is unknown or out of range.
        SelectionError: The model has no matrix that could be selected.
    """
    check_choice("algo", algo, (*RULES, AMUSE, ADAMW))
    known = known_options(algo)
    if "qk_clip" in options:
        raise ConfigurationError(
            "qk_clip is not an option of an optimizer, because it needs the attention logits. Put "
            "it into pss_optim_args of PSSTrainingArguments, or attach "
            "hf_pss.optim.qk_clip.QKClip to the optimizer."
        )
    if unknown := options.keys() - known.keys():
        raise ConfigurationError(
            f"{algo} has no option {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(sorted(known))}."
        )
    kind, rule = _kind_and_rule(algo)
    names = {*inspect.signature(matrix_groups).parameters, *_own_options(rule)}
    grouping = {name: options.pop(name) for name in names & options.keys()}
    if (ratio := options.pop(LR_RATIO, None)) is not None:
        if not 0 < ratio < math.inf:
            raise ConfigurationError(
                f"You gave {LR_RATIO}={ratio}; choose a finite number above 0, such as 0.125."
            )
        grouping["lr"] = ratio * options.get("lr", known["lr"])
    optimizer = kind(matrix_groups(model, algo=rule, **grouping), **options)
    if backend_for({}).rank == 0:  # the first rank of the run, however parameters are stored
        logger.info("%s", describe_groups(optimizer))
    return optimizer


def known_options(algo: str) -> dict[str, Any]:
    """Return the options of `build_optimizer`, except the model and ``algo``, with their defaults.

    Args:
        algo: As in `build_optimizer`.
    """
    kind, rule = _kind_and_rule(algo)
    known = {
        name: parameter.default
        for function in (matrix_groups, MatrixOptimizer, kind)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name != "algo"
    }
    if algo == ADAMW:
        return {LR_RATIO: 1.0, **{name: known[name] for name in _OF_ADAMW}}
    return known | dict(_own_options(rule))


def _own_options(rule: str) -> Mapping[str, Any]:
    return {} if rule == ADAMW else rule_named(rule).defaults


def _kind_and_rule(algo: str) -> tuple[type[MatrixOptimizer], str]:
    if algo != AMUSE:
        return MatrixOptimizer, algo
    from hf_pss.optim.amuse import Amuse

    return Amuse, "muon"


def describe_groups(optimizer: MatrixOptimizer) -> str:
    """Return a table of the groups, with the number of parameters that are moved by heads."""
    lines = [f"{'algo':<10}{'parameters':>11}{'entries':>16}{'lr':>11}{'decay':>8}"]
    for group in optimizer.param_groups:
        entries = sum(parameter.numel() for parameter in group["params"])
        num_by_head = sum(map(is_by_head, group["layouts"] or ()))
        lines.append(
            f"{group['algo']:<10}{len(group['params']):>11}{entries:>16,}"
            f"{group['lr']:>11.3g}{group['weight_decay']:>8.3g}"
            + (f"   {num_by_head} by head" if num_by_head else "")
        )
    return "\n".join(lines)
