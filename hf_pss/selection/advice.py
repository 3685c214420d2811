"""What to tell somebody whose model has no weight matrix that PSS selects by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from hf_pss.selection.rules import ADAPTER_FACTOR, why_unusable
from hf_pss.selection.survey import Site, survey
from hf_pss.selection.views import Selection

__all__ = ["example_pattern", "what_to_do", "why_empty"]

_MAX_REASONS = 4
_LORA = "LORA"  # of peft.PeftType
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)|^\d+(?=\\\.)")


def why_empty(selection: Selection) -> str:
    """Say that no matrix of a model was selected, and what its parameters are."""
    seen = Counter(exclusion.reason for exclusion in selection.exclusions)
    counts = "; ".join(f"{count} × {reason}" for reason, count in seen.most_common(_MAX_REASONS))
    return f"No weight matrix of this model is selected. Parameters seen: {counts or 'none'}."


def what_to_do(model: nn.Module, *, exclude: Sequence[str] = (), spelling: str = "{}") -> str:
    """Say how a matrix of this very model can be selected, or why none can.

    Args:
        model: Any module, wrapped or not.
        exclude: The caller's patterns of that name, which would win over an ``include``.
        spelling: How the caller spells an option; the braces stand for ``name=value``.
    """
    kinds = _adapter_kinds(model)
    if others := [kind for kind in kinds if kind != _LORA]:
        return f"PSS does not watch adapters of this kind ({', '.join(others)})."
    if kinds or any(why_unusable(site) == ADAPTER_FACTOR for site in survey(model)):
        return "Its LoRA adapters are frozen, inactive, merged, or not products of two matrices."
    pattern = example_pattern(model, exclude=exclude)
    if pattern is not None:
        return f"To select one, name it: {spelling.format(f'include=[{_raw(pattern)}]')}."
    which = "that your exclude patterns leave in " if exclude else ""
    return f"No trainable parameter {which}is a matrix with two or more rows and columns."


def example_pattern(model: nn.Module, *, exclude: Sequence[str] = ()) -> str | None:
    """Return an ``include`` pattern for the largest matrix that a pattern can select.

    The numbers of blocks are left open. None where the model has no such matrix.
    """
    sites = [
        site
        for site in survey(model)
        if _can_be_named(site) and not any(re.search(pattern, site.name) for pattern in exclude)
    ]
    # Two-dimensional ones first: how a stack is read is a guess.
    best = max(sites, key=lambda site: (len(site.shape) == 2, _size(site)), default=None)
    return None if best is None else _NUMBER.sub(r"\\d+", re.escape(best.name))


def _can_be_named(site: Site) -> bool:
    return (
        why_unusable(site) is None
        and not site.is_embedding
        and min(site.shape[-2:]) >= 2
        and not _NORM_CLASS.search(type(site.module).__name__)
    )


def _size(site: Site) -> int:
    return site.shape[-2] * site.shape[-1]


def _raw(pattern: str) -> str:
    return f"r{pattern!r}".replace("\\\\", "\\")


def _adapter_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of PEFT adapters that a model carries."""
    kinds: dict[str, None] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, Mapping) else ():
            kind = getattr(config, "peft_type", None)
            if kind is not None:
                kinds[str(getattr(kind, "value", kind))] = None
    return list(kinds)
