"""The rules for one parameter: may it be selected, in which role, and as which matrices.

What to tell somebody whose model has no weight matrix that PSS selects by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from hf_pss.models.selection.layouts import Parts, find_layout, looks_fused, stores_inputs_first
from hf_pss.models.selection.survey import Site, is_linear, survey
from hf_pss.models.selection.views import MatrixView, Role, RowPattern, Selection

__all__ = [
    "ADAPTER_FACTOR",
    "example_pattern",
    "matrices_of",
    "role_of",
    "what_to_do",
    "why_empty",
    "why_no_block_matrix",
    "why_unusable",
    "why_unwanted",
]

ADAPTER_FACTOR = "LoRA factor: the matrix is the product"

_LORA = re.compile(
    r"(?:^|\.)lora_(?:embedding_)?[AB](?:\.|$)|(?:^|\.)lora_magnitude_vector(?:\.|$)"
)
_ROUTER_NAME = re.compile(r"router|^(?:gate|shared_expert_gate|wg)$", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"Router|Gating")
_RECURRENT_CLASS = re.compile(r"Mamba|Mixer$|SSM|Rwkv|ShortConv|RecurrentBlock|LSTM")
_RECURRENT_NAME = re.compile(r"mamba|mixer|ssm|rwkv", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|qkv|^att_proj$", re.IGNORECASE)
# FocalNet's `modulation` mixes tokens, as attention does in other models.
_TOKEN_MIXER_CLASS = re.compile(r"attn|attention|^(?:FSDP)?Focal", re.IGNORECASE)
_OUTPUT_HEAD = "output head inside a block"
# Why the matrices of a module are left alone, by the module's name or by its class. A norm without
# conditioning holds no matrix. Names and classes of wrappers around a whole layer (PreNorm, DBRX's
# norm_attn_norm) and of linear layers with a norm (timm's LinearNorm) must not match.
_PURPOSES = (
    (
        _OUTPUT_HEAD,
        re.compile(
            r"^(?:(?:lm|shared|mtp|medusa|output|pred(?:iction)?|cls|class)_?)?head$"
            r"|^(?:embed_out|unembed(?:ding)?|to_logits|classifier)$",
            re.IGNORECASE,
        ),
        re.compile(r"(?:LM|Medusa|MTP|Prediction)Head$"),
    ),
    (
        "modulation or conditioning layer",
        re.compile(
            r"^(?!pre_?norm|post_?norm)(?:\w*_)?(?:layer|rms|group)?_?norm_?\d*(?:_context)?$"
            r"|modulat|ada_?ln|ada_?(?:layer_?)?norm|(?:^|_)mod(?:_|\d*$)|(?:^|_)film"
            r"|scale_?shift|shift_?scale|(?:^|_)cond(?:ition(?:ing|er)?)?(?:_|\d*$)",
            re.IGNORECASE,
        ),
        re.compile(
            r"(?:Ada\w*|(?<!Pre)(?<!Post)(?:Layer|RMS|Rms|Group|Batch|Instance))Norm"
            r"(?:Zero|Single|Continuous|Shift|Final|Out|X|_)*$|AdaL[Nn]|Modulat(?:ion|or)$|Fi[Ll]M"
        ),
    ),
    (
        "timestep, position or other embedder",
        re.compile(
            r"(?:^|_)emb(?:ed(?:d(?:er|ing))?s?)?(?:_|\d*$)|timestep|(?:^|_)time_(?:mlp|proj)"
            r"|(?:^|_)pos(?:ition)?(?:al)?_?(?:bias|enc|mlp)|(?:^|_)(?:cpb|rel_pos|meta_mlp)(?:_|$)",
            re.IGNORECASE,
        ),
        re.compile(r"Embed(?:s|der|dings?)?(?:\dD)?$|RelPos(?:Mlp|Bias)"),
    ),
)
# Anchored at the end: class names begin with the model's name, and JetMoeMoA is attention.
_MLP_CLASS = re.compile(r"(?:MLP|Mlp|MoE|MoeBlock|FFN|FeedForward)$")
_MLP_NAME = re.compile(r"^(?:mlp|ffn|feed_forward|moe)$", re.IGNORECASE)
_EXPERTS_CLASS = re.compile(r"Experts?$")


def why_unusable(site: Site) -> str | None:
    """Return why a parameter can never be a weight matrix of ours, whatever a pattern says."""
    if site.tied_to is not None:
        return f"tied to {site.tied_to}"
    if _LORA.search(site.name):
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
    if _is_router(site):
        return "router"
    steps = ((name, type(module).__name__) for name, module in site.path)
    if (purpose := why_no_block_matrix(steps)) is not None:
        return purpose
    if _is_output_head(site):
        return _OUTPUT_HEAD
    role = role_of(site)
    if role is None:
        return "state-space or convolutional mixer"
    if not _is_projection(site):
        return f"{len(site.shape)}-D parameter of {type(site.module).__name__}, meaning unknown"
    if role not in roles:
        return f"role {role} was not asked for"
    return None


def why_no_block_matrix(steps: Iterable[tuple[str, str]]) -> str | None:
    """Return why a matrix inside a block is not one of its attention or MLP, by names alone.

    The innermost name decides: the projections of an attention module stay what they are, whatever
    holds that module.

    Args:
        steps: Name and class of each module, from the parameter's outwards to below the block. The
            class may be empty, as in a checkpoint.

    Example:
        >>> why_no_block_matrix([("linear", "Linear"), ("norm1", "AdaLayerNormZero")])
        'modulation or conditioning layer'
    """
    for name, class_name in steps:
        if _TOKEN_MIXER_CLASS.search(class_name):
            return None
        for reason, of_name, of_class in _PURPOSES:
            if of_name.search(name) or of_class.search(class_name):
                return reason
        if _ATTENTION.search(name):
            return None
    return None


def role_of(site: Site) -> Role | None:
    """Return the role by the names around a parameter, innermost first; None for recurrent mixers.

    Classes come before attribute names: Nemotron-H calls attention, MLP and Mamba alike `mixer`.
    """
    for name, module in site.path:
        class_name = type(module).__name__
        if _RECURRENT_CLASS.search(class_name):
            return None
        if _ATTENTION.search(class_name) or _ATTENTION.search(name):
            return "attention"
        if _MLP_CLASS.search(class_name) or _MLP_NAME.search(name):
            return "mlp"
        if _RECURRENT_NAME.search(name):
            return None
    return "mlp"


def matrices_of(site: Site, included_by: str | None) -> list[MatrixView]:
    """Return one view for each matrix that a parameter holds.

    Args:
        site: A usable parameter.
        included_by: The pattern that included it, where the rules alone would not have.
    """
    transposed = stores_inputs_first(site.module)
    *experts, rows, columns = site.shape
    if transposed:
        rows, columns = columns, rows
    reason = _description(site, transposed, included_by)
    parts = find_layout(site.owner, site.leaf, rows)
    if parts is None:
        fused = "; fused, layout unknown: kept as one matrix" if looks_fused(site.leaf) else ""
        whole = (*experts, rows, columns)
        return [_view(site, "", whole, transposed, None, reason + fused)]
    num_periods = rows // sum(size for _, size in parts)
    return [
        _view(
            site,
            f"[{label}]",
            (*experts, num_periods * pattern.size, columns),
            transposed,
            pattern,
            f"{reason}; {label} of {_layout_text(parts, num_periods)}",
        )
        for label, pattern in _row_patterns(parts)
    ]


def _is_router(site: Site) -> bool:
    return any(
        _ROUTER_NAME.search(name) or _ROUTER_CLASS.search(type(module).__name__)
        for name, module in site.path
    )


def _is_output_head(site: Site) -> bool:
    """Tell by its size whether a matrix in a block gives one number for each word.

    Small models often have as many hidden units as words. But hidden units, gated or not, are read
    by another matrix of the block, and nothing reads a head's output.
    """
    if len(site.shape) != 2 or role_of(site) != "mlp":
        return False
    rows, columns = site.shape[::-1] if stores_inputs_first(site.module) else site.shape
    if rows not in site.vocabularies or rows <= columns:
        return False
    return site.block_inputs.isdisjoint((rows, rows // 2))


def _is_projection(site: Site) -> bool:
    if len(site.shape) == 3:
        declared = isinstance(getattr(site.module, "is_transposed", None), bool)
        return declared or _EXPERTS_CLASS.search(type(site.module).__name__) is not None
    if isinstance(site.module, nn.MultiheadAttention):
        return site.own_name.endswith("_proj_weight")
    return is_linear(site.module) and site.own_name == "weight"


def _row_patterns(parts: Parts) -> list[tuple[str, RowPattern]]:
    period, start, patterns = sum(size for _, size in parts), 0, []
    for label, size in parts:
        patterns.append((label, RowPattern(start, size, period)))
        start += size
    return patterns


def _view(
    site: Site,
    suffix: str,
    shape: tuple[int, ...],
    transposed: bool,
    rows: RowPattern | None,
    reason: str,
) -> MatrixView:
    return MatrixView(
        name=site.name + suffix,
        parameter_name=site.name,
        role=role_of(site) or "mlp",
        block=site.block or site.name.rpartition(".")[0],
        shape=shape,
        transposed=transposed,
        rows=rows,
        reason=reason,
    )


def _description(site: Site, transposed: bool, included_by: str | None) -> str:
    included = f"included by {included_by!r}: " if included_by is not None else ""
    stack = f", a stack of {site.shape[0]}" if len(site.shape) == 3 else ""
    stored = ", stored (in, out)" if transposed else ""
    return f"{included}{type(site.module).__name__}{stack}{stored}"


def _layout_text(parts: Parts, num_periods: int) -> str:
    layout = " | ".join(f"{label} {size}" for label, size in parts)
    return f"[{layout}]" if num_periods == 1 else f"{num_periods} × [{layout}]"


_MAX_REASONS = 4
_LORA_KIND = "LORA"  # of peft.PeftType
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
