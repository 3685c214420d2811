"""The rules for one parameter of a model: whether it is selected, and as which matrices.

If no matrix of a model is selected, this module also gives advice on what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from hf_pss.models.selection.by_name import (
    ADAPTER_FACTOR,
    is_adapter_factor,
    role_of,
    why_no_projection,
)
from hf_pss.models.selection.layouts import (
    Parts,
    RowPattern,
    find_layout,
    looks_fused,
    row_patterns,
    stores_inputs_first,
)
from hf_pss.models.selection.survey import Site, is_linear, survey
from hf_pss.models.selection.views import MatrixView, Selection

_EXPERTS_CLASS = re.compile(r"Experts?$")
_MAX_REASONS = 4
_LORA_KIND = "LORA"  # a name in peft.PeftType
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)|^\d+(?=\\\.)")


def why_unusable(site: Site) -> str | None:
    """Return why a parameter can never be selected, even by a pattern."""
    if site.tied_to is not None:
        return f"tied to {site.tied_to}"
    if is_adapter_factor(site.name):
        return ADAPTER_FACTOR
    if not site.parameter.requires_grad:
        return "frozen"
    if not site.parameter.is_floating_point():
        return f"{site.parameter.dtype}, not real floating point"
    if isinstance(site.module, nn.modules.conv._ConvNd):
        return "convolution"
    if len(site.shape) < 2 or "bias" in site.own_name:
        return "bias, norm or scale"
    if len(site.shape) > 3:
        return f"{len(site.shape)}-D"
    if 0 in site.shape:
        return "empty"
    return None


def why_unwanted(site: Site, roles: Collection[str]) -> str | None:
    """Return why the rules skip a parameter that a pattern could include."""
    if site.is_embedding:
        return "embedding or output head"
    if site.block is None:
        return "outside the repeated blocks"
    if site.shared_with is not None:
        return f"shared with {site.shared_with}"
    shape = site.shape[::-1] if stores_inputs_first(site.module) else site.shape
    reason = why_no_projection(
        site.steps, shape, vocabularies=site.vocabularies, block_inputs=site.block_inputs
    )
    if reason is not None:
        return reason
    if not _is_projection(site):
        return f"{len(site.shape)}-D parameter of {type(site.module).__name__}, meaning unknown"
    role = role_of(site.steps)
    return None if role in roles else f"role {role} was not asked for"


def matrices_of(site: Site, included_by: str | None) -> list[MatrixView]:
    """Return one view for each matrix that a parameter holds.

    Args:
        site: A usable parameter.
        included_by: The pattern that included it against the rules. None if the rules include it.
    """
    transposed = stores_inputs_first(site.module)
    *experts, rows, columns = site.shape
    if transposed:
        rows, columns = columns, rows
    included = f"included by {included_by!r}: " if included_by is not None else ""
    stack = f", a stack of {site.shape[0]}" if experts else ""
    stored = ", stored (in, out)" if transposed else ""
    reason = f"{included}{type(site.module).__name__}{stack}{stored}"

    def view(suffix: str, num_rows: int, pattern: RowPattern | None, note: str) -> MatrixView:
        return MatrixView(
            name=site.name + suffix,
            parameter_name=site.name,
            role=role_of(site.steps) or "mlp",
            block=site.block or site.name.rpartition(".")[0],
            shape=(*experts, num_rows, columns),
            transposed=transposed,
            rows=pattern,
            reason=reason + note,
        )

    parts = find_layout(site.owner, site.leaf, rows)
    if parts is None:
        fused = "; fused, layout unknown: kept as one matrix" if looks_fused(site.leaf) else ""
        return [view("", rows, None, fused)]
    return [
        view(
            f"[{label}]",
            rows // pattern.period * pattern.size,
            pattern,
            f"; {label} of {_layout_text(parts, rows // pattern.period)}",
        )
        for label, pattern in row_patterns(parts)
    ]


def _is_projection(site: Site) -> bool:
    if len(site.shape) == 3:
        declared = isinstance(getattr(site.module, "is_transposed", None), bool)
        return declared or _EXPERTS_CLASS.search(type(site.module).__name__) is not None
    if isinstance(site.module, nn.MultiheadAttention):
        return site.own_name.endswith("_proj_weight")
    return is_linear(site.module) and site.own_name == "weight"


def _layout_text(parts: Parts, num_periods: int) -> str:
    layout = " | ".join(f"{label} {size}" for label, size in parts)
    return f"[{layout}]" if num_periods == 1 else f"{num_periods} × [{layout}]"


def why_empty(selection: Selection) -> str:
    """Return a sentence about a selection without matrices, with the reasons for its parameters."""
    seen = Counter(exclusion.reason for exclusion in selection.exclusions)
    counts = "; ".join(f"{count} × {reason}" for reason, count in seen.most_common(_MAX_REASONS))
    return f"No weight matrix of this model is selected. Parameters seen: {counts or 'none'}."


def what_to_do(model: nn.Module, *, exclude: Sequence[str] = (), spelling: str = "{}") -> str:
    """Return advice on how to select a matrix of this model, or why that is impossible.

    Args:
        model: Any module, wrapped or not.
        exclude: The caller's ``exclude`` patterns, which take priority over an ``include``.
        spelling: How the caller writes an option. The braces stand for ``name=value``.
    """
    kinds = _adapter_kinds(model)
    if others := [kind for kind in kinds if kind != _LORA_KIND]:
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

    The pattern matches this matrix in every block. The result is None if there is no such matrix.
    """
    sites = [
        site
        for site in survey(model)
        if _can_be_named(site) and not any(re.search(pattern, site.name) for pattern in exclude)
    ]
    # 2-D parameters come first, because the orientation of a stack is only a guess.
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
    """Return the kinds of PEFT adapters that a model has."""
    kinds: dict[str, None] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, Mapping) else ():
            kind = getattr(config, "peft_type", None)
            if kind is not None:
                kinds[str(getattr(kind, "value", kind))] = None
    return list(kinds)
