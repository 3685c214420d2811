"""Selection of a model's weight matrices, by rules and by the user's patterns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import get_args

from torch import nn

from hf_pss.errors import ConfigurationError, SelectionError
from hf_pss.models.selection.pairs import AdapterView, find_adapters
from hf_pss.models.selection.parameter_rules import (
    matrices_of,
    what_to_do,
    why_empty,
    why_unusable,
    why_unwanted,
)
from hf_pss.models.selection.survey import Site, survey
from hf_pss.models.selection.views import Exclusion, MatrixView, Role, Selection

_ROLES: tuple[Role, ...] = get_args(Role)


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
