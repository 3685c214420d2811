"""Selection of a model's weight matrices, by rules and by the user's patterns.

If no matrix of a model is selected, this module also gives advice on what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import get_args

from torch import nn

from hf_pss.errors import ConfigurationError, SelectionError
from hf_pss.models.selection.by_name import (
    ADAPTER_FACTOR,
    is_adapter_factor,
    role_of,
    why_no_projection,
)
from hf_pss.models.selection.layouts import (
    RowPattern,
    find_layout,
    looks_fused,
    row_patterns,
    stores_inputs_first,
)
from hf_pss.models.selection.survey import Site, find_adapters, is_linear, survey
from hf_pss.models.selection.views import AdapterView, Exclusion, MatrixView, Role, Selection

_ROLES: tuple[Role, ...] = get_args(Role)
_EXPERTS_CLASS = re.compile(r"Experts?$")
_MAX_REASONS = 4
_LORA_KIND = "LORA"  # a name in peft.PeftType
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)|^\d+(?=\\\.)")


def select_matrices(
    model: nn.Module,
    *,
    roles: Collection[str] = ("attention", "mlp"),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_dim: int = 2,
    may_be_empty: bool = False,
) -> Selection:
    r"""Find the attention and MLP weight matrices in the repeated blocks of a model.

    The function selects the weights of nn.Linear (and its subclasses), of transformers' Conv1D and
    of nn.MultiheadAttention. It also selects 3-D stacks of experts. A fused projection with a known
    layout becomes one matrix for each part. A fused projection with an unknown layout stays one
    matrix, and its reason notes this. The following are not selected, and the table gives the
    reason for each:

    - embeddings and output heads, whether tied or not, and whether inside a block or not;
    - modulation and conditioning layers, which often start at 0, and embedders of timesteps and
      positions;
    - matrices that a block shares with a module outside of all blocks;
    - routers, convolutions, vectors, recurrent mixers, adapters' factors, and frozen parameters;
    - everything outside of the repeated blocks.

    Args:
        model: Any module, wrapped or not. Only names, shapes and flags are read.
        roles: The roles to select.
        include: Regular expressions that are searched in canonical parameter names. A trainable 2-D
            or 3-D parameter that matches is selected even against the rules. If it is not a known
            projection, it is read as stored: (out, in), or (stack, out, in).
        exclude: Regular expressions that are searched in parameter and matrix names. They
            take priority over `include`. A pattern that ends in ``\[v\]$`` excludes one
            part of fused projections.
        min_dim: Matrices with fewer rows or columns are skipped, unless a pattern includes them.
        may_be_empty: Return an empty selection instead of raising if no matrix is selected.

    Returns:
        The matrices in the model's order, and every other parameter with the reason.

    Raises:
        SelectionError: No matrix is selected and `may_be_empty` is false. Or a pattern is not a
            regular expression, matches nothing, or matches only parameters that cannot be selected.
        ConfigurationError: A role is unknown, `min_dim` is below 1, or a list is one string.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
        >>> model = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        >>> [matrix.name for matrix in select_matrices(model, roles=["mlp"]).matrices]
        ['layers.0.linear1.weight', 'layers.0.linear2.weight']
    """
    _check_options(roles, min_dim)
    include_patterns = _compiled(include, "include")
    exclude_patterns = _compiled(exclude, "exclude")
    sites = {site.name: site for site in survey(model)}
    products, left_out = find_adapters(model)
    factors = {name for view in products for name in (view.left_name, view.right_name)}
    adapters, exclusions = _choose_products(
        products, sites, roles, include_patterns, exclude_patterns
    )
    matrices: list[MatrixView] = []
    for site in sites.values():
        if site.name in factors:
            continue
        unwanted = why_unwanted(site, roles)
        included_by = _first_match(include_patterns, site.name)
        reason = left_out.get(site.name) or why_unusable(site)
        reason = reason or (unwanted if included_by is None else None)
        if reason is not None:
            exclusions.append(Exclusion(site.name, site.shape, reason))
            continue
        for view in matrices_of(site, included_by if unwanted else None):
            # The matrix's name begins with the parameter's name, but `weight$`
            # must match the latter.
            excluded_by = _first_match(exclude_patterns, view.name, site.name)
            if excluded_by is not None:
                out = Exclusion(view.name, view.shape, f"excluded by {excluded_by!r}")
                exclusions.append(out)
            elif included_by is None and min(view.shape[-2:]) < min_dim:
                few = f"fewer than min_dim = {min_dim} rows or columns"
                exclusions.append(Exclusion(view.name, view.shape, few))
            else:
                matrices.append(view)
    selection = Selection(tuple(matrices), tuple(exclusions), adapters)
    _check_all_match((*include_patterns, *exclude_patterns), selection, products)
    _check_all_include(include_patterns, selection)
    if not may_be_empty and not selection.matrices and not selection.adapters:
        advice = what_to_do(model, exclude=exclude)
        raise SelectionError(f"{why_empty(selection)} {advice}")
    return selection


def _choose_products(
    products: Sequence[AdapterView],
    sites: Mapping[str, Site],
    roles: Collection[str],
    include: Sequence[re.Pattern[str]],
    exclude: Sequence[re.Pattern[str]],
) -> tuple[tuple[AdapterView, ...], list[Exclusion]]:
    """Return the selected products, by the rules for matrices, and the exclusions."""
    chosen: list[AdapterView] = []
    exclusions: list[Exclusion] = []
    for view in products:
        unwanted = why_unwanted(sites[view.left_name], roles)
        excluded_by = _first_match(exclude, *view.names)
        if excluded_by is not None:
            reason = f"excluded by {excluded_by!r}"
            exclusions.append(Exclusion(view.name, view.shape, reason))
        elif unwanted is not None and _first_match(include, *view.names) is None:
            exclusions.append(Exclusion(view.name, view.shape, unwanted))
        else:
            chosen.append(view)
    return tuple(chosen), exclusions


def _check_options(roles: Collection[str], min_dim: int) -> None:
    if isinstance(roles, str) or not set(roles) <= set(_ROLES):
        raise ConfigurationError(
            f"roles = {roles!r}, but a role is one of {', '.join(_ROLES)}: pass a list of those."
        )
    if min_dim < 1:
        raise ConfigurationError(
            f"min_dim = {min_dim}, but no matrix has fewer than 1 row: pass 1 or more."
        )


def _compiled(patterns: Sequence[str], option: str) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ConfigurationError(
            f"{option} = {patterns!r} is one string, but a list of patterns is expected: "
            f"write {option}=[{patterns!r}]."
        )
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise SelectionError(
                f"The {option} pattern {pattern!r} is not a regular expression ({error}): "
                "put a backslash before brackets, stars and dots that are meant literally."
            ) from error
    return compiled


def _first_match(patterns: Iterable[re.Pattern[str]], *names: str) -> str | None:
    """Return the first pattern that is found in one of the names."""
    return next((p.pattern for p in patterns if any(map(p.search, names))), None)


def _check_all_match(
    patterns: Iterable[re.Pattern[str]], selection: Selection, products: Sequence[AdapterView]
) -> None:
    names = [matrix.parameter_name for matrix in selection.matrices]
    names += [matrix.name for matrix in selection.matrices]
    names += [exclusion.parameter_name for exclusion in selection.exclusions]
    names += [name for view in products for name in view.names]
    for pattern in patterns:
        if _first_match([pattern], *names, *(name.partition("[")[0] for name in names)) is None:
            raise SelectionError(
                f"The pattern {pattern.pattern!r} matches no parameter of the model. "
                f"{_similar(pattern.pattern, names)}"
            )


def _check_all_include(patterns: Iterable[re.Pattern[str]], selection: Selection) -> None:
    selected = [matrix.parameter_name for matrix in selection.matrices]
    selected += [name for view in selection.adapters for name in view.names]
    for pattern in patterns:
        if _first_match([pattern], *selected) is None:
            refused = (
                f"{e.parameter_name} is out ({e.reason})"
                for e in selection.exclusions
                if pattern.search(e.parameter_name)
            )
            raise SelectionError(
                f"The include pattern {pattern.pattern!r} matches nothing that can be selected: "
                f"{next(refused, 'an exclude pattern wins over it')}. Remove the pattern, or "
                "include a trainable 2-D or 3-D parameter."
            )


def _similar(pattern: str, names: Sequence[str]) -> str:
    # Users often write only the end of a name.
    ends = {".".join(n.split(".")[-length:]): n for n in names for length in range(1, 6)}
    close = get_close_matches(pattern.replace("\\", "").strip("^$"), ends, n=3, cutoff=0.5)
    shown = dict.fromkeys(ends[end] for end in close)
    return f"Close names: {', '.join(shown)}." if shown else f"A name there is {names[0]}."


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

    parts = find_layout(site.owner, site.leaf, rows)
    pieces: list[tuple[str, int, RowPattern | None, str]] = []
    if parts is None:
        fused = "; fused, layout unknown: kept as one matrix" if looks_fused(site.leaf) else ""
        pieces.append(("", rows, None, fused))
    for label, pattern in row_patterns(parts or ()):
        periods = rows // pattern.period
        layout = f"[{' | '.join(f'{name} {size}' for name, size in parts or ())}]"
        layout = layout if periods == 1 else f"{periods} × {layout}"
        pieces.append((f"[{label}]", periods * pattern.size, pattern, f"; {label} of {layout}"))
    return [
        MatrixView(
            name=site.name + suffix,
            parameter_name=site.name,
            role=role_of(site.steps) or "mlp",
            block=site.block or site.name.rpartition(".")[0],
            shape=(*experts, num_rows, columns),
            transposed=transposed,
            rows=pattern,
            reason=reason + note,
        )
        for suffix, num_rows, pattern, note in pieces
    ]


def _is_projection(site: Site) -> bool:
    if len(site.shape) == 3:
        declared = isinstance(getattr(site.module, "is_transposed", None), bool)
        return declared or _EXPERTS_CLASS.search(type(site.module).__name__) is not None
    if isinstance(site.module, nn.MultiheadAttention):
        return site.own_name.endswith("_proj_weight")
    return is_linear(site.module) and site.own_name == "weight"


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
        raw = f"r{pattern!r}".replace("\\\\", "\\")
        return f"To select one, name it: {spelling.format(f'include=[{raw}]')}."
    which = "that your exclude patterns leave in " if exclude else ""
    return f"No trainable parameter {which}is a matrix with two or more rows and columns."


def example_pattern(model: nn.Module, *, exclude: Sequence[str] = ()) -> str | None:
    """Return an ``include`` pattern for the largest matrix that a pattern can select.

    The pattern matches this matrix in every block. The result is None if there is no such matrix.
    """
    sites = [
        site
        for site in survey(model)
        if why_unusable(site) is None
        and not site.is_embedding
        and min(site.shape[-2:]) >= 2
        and not _NORM_CLASS.search(type(site.module).__name__)
        and not any(re.search(pattern, site.name) for pattern in exclude)
    ]
    # 2-D parameters come first, because the orientation of a stack is only a guess.
    best = max(sites, key=lambda s: (len(s.shape) == 2, prod(s.shape[-2:])), default=None)
    return None if best is None else _NUMBER.sub(r"\\d+", re.escape(best.name))


def _adapter_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of PEFT adapters that a model has."""
    configs = (getattr(module, "peft_config", None) for module in model.modules())
    every = [c for held in configs if isinstance(held, Mapping) for c in held.values()]
    kinds = [kind for c in every if (kind := getattr(c, "peft_type", None)) is not None]
    return list(dict.fromkeys(str(getattr(kind, "value", kind)) for kind in kinds))
