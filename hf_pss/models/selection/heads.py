"""The rows of query, key and value projections that belong to each attention head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_pss.models.selection.by_name import role_of
from hf_pss.models.selection.layouts import class_names, looks_fused
from hf_pss.models.selection.select import matrices_of
from hf_pss.models.selection.survey import Site, is_linear, survey
from hf_pss.models.selection.views import MatrixView

# The names of projections that are not fused.
_PROJECTIONS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "q", "wq", "query_proj", "q_attn", "to_q"), "q"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "k", "wk", "key_proj", "to_k"), "k"),
    **dict.fromkeys(("v_proj", "value", "v_lin", "v", "wv", "value_proj", "to_v"), "v"),
    "q_b_proj": "q",
}
_UNKNOWN = "fused, layout unknown"
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_LATENT_HEAD_DIM = "qk_head_dim"
_VALUE_HEAD_DIM = "v_head_dim"
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
# Parameters that are added to logits. They leave queries and keys unchanged.
_HARMLESS = frozenset({"sinks", "relative_position_bias_table"})
_CROSS = re.compile(r"cross_?att|encoder_att|encdecatt", re.IGNORECASE)
_NORM = re.compile(r"^(?:q|k|qk|query|key)_?(?:layer)?_?norms?$|^[qk]_b_norm$")


@dataclass(frozen=True, slots=True)
class Heads:
    """The number and width of the heads of an attention module."""

    num_heads: int
    num_key_heads: int
    """The number of key heads. It is less than `num_heads` if neighbouring heads share them."""
    head_dim: int


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The output rows of one projection inside the linear layer that holds it."""

    linear: nn.Module
    view: MatrixView

    def stored_rows(self, device: torch.device) -> Tensor:
        """Return the stored output row of each row of the projection, head by head."""
        return self.view.stored_rows(device)


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """An attention module whose queries and keys are linear in known weights."""

    name: str
    module: nn.Module
    heads: Heads
    query: HeadRows
    key: HeadRows
    is_cross_attention: bool = False
    """Whether keys come from a different sequence, judged by attribute, class and names."""


def heads_of(owner: nn.Module) -> Heads | None:
    """Return the heads of an attention module, read from its attributes and its config.

    Args:
        owner: The module whose forward uses the projections.
    """
    num_heads, num_key_heads, head_dim = _numbers_of(owner)
    if num_heads is None or num_key_heads is None or head_dim is None:
        return None
    return Heads(num_heads, num_key_heads, head_dim) if num_heads % num_key_heads == 0 else None


def head_rows(site: Site, views: Sequence[MatrixView]) -> tuple[int, ...] | None:
    """Return the number of output rows of one head, for each view of a parameter.

    Args:
        site: The parameter.
        views: All views of the parameter.

    Returns:
        The numbers. None if a number is unknown, and for views without heads. Such views are an
        output projection, the compressed keys of latent attention, or an MLP.
    """
    if len(site.shape) != 2 or role_of(site.steps) != "attention":
        return None
    found = [_rows_of_a_head(site, view) for view in views]
    known = tuple(rows for rows in found if rows is not None)
    return known if len(known) == len(views) else None


def is_of_heads(site: Site, views: Sequence[MatrixView]) -> bool:
    """Return whether a parameter seems to be divided among heads, judged by its names."""
    if role_of(site.steps) != "attention":
        return False
    return any(_label(site, view) in ("q", "k", "v", "k_nope", _UNKNOWN) for view in views)


def find_heads(model: nn.Module) -> tuple[list[AttentionHeads], dict[str, str]]:
    """Return the attention modules with known heads, and the reasons for all others, by name.

    A module counts as attention if one of its projections is named or divided
    as a query projection.

    Args:
        model: Any module, wrapped or not.
    """
    owners: dict[int, tuple[str, nn.Module, dict[str, HeadRows], set[str]]] = {}
    for site in survey(model):
        if site.tied_to is not None or role_of(site.steps) != "attention" or len(site.shape) != 2:
            continue
        name = site.name.rpartition(".")[0].removesuffix(".base_layer")  # a level that peft adds
        name = name.rpartition(".")[0] if site.own_name == "weight" else name
        *_, rows, labels = owners.setdefault(id(site.owner), (name, site.owner, {}, set()))
        for view in matrices_of(site, None):
            labels.add(label := _label(site, view))
            if is_linear(site.module):
                rows.setdefault(label, HeadRows(site.module, view))
    found, reasons = [], {}
    for name, owner, rows, labels in owners.values():
        if labels.isdisjoint(("q", _UNKNOWN)):
            continue
        reason = _why_unknown(owner, rows)
        heads = heads_of(owner)
        if reason is None and heads is not None:
            is_cross = _is_cross_attention(name, owner)
            found.append(AttentionHeads(name, owner, heads, rows["q"], rows["k"], is_cross))
        else:
            reasons[name] = reason or "its heads are not known"
    return found, reasons


def _numbers_of(owner: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Return the numbers of heads and of key heads, and the width of a head. None if unknown."""
    config = getattr(owner, "config", None)
    num_heads = _first(owner, _NUM_HEADS) or _first(config, ("num_attention_heads",))
    num_key_heads = _first(owner, _NUM_KEY_HEADS) or _first(config, _NUM_KEY_HEADS[:1])
    head_dim = _first(owner, _HEAD_DIM) or _first(config, _HEAD_DIM[:1])
    return num_heads, num_heads if num_key_heads is None else num_key_heads, head_dim


def _why_unknown(owner: nn.Module, rows: Mapping[str, HeadRows]) -> str | None:
    """Return why the logits of a module are not a known function of two known projections."""
    norms = [name for name, child in owner.named_children() if _NORM.match(name)]
    if norms:
        return f"{norms[0]} normalises a projection's output, so its scale changes no logit"
    holders = (owner, getattr(owner, "config", None))  # DBRX has it only on the module
    if any(getattr(holder, "clip_qkv", None) is not None for holder in holders):
        return "clip_qkv clips a projection's output, so logits do not scale with weights"
    heads = heads_of(owner)
    if heads is None or not {"q", "k"} <= rows.keys():
        return "its projections or heads are not known"
    own = (name for name, _ in owner.named_parameters(recurse=False) if name not in _HARMLESS)
    if (name := next(own, None)) is not None:
        return f"it holds {name}, which may change queries or keys after the projection"
    wanted = {"q": heads.num_heads * heads.head_dim, "k": heads.num_key_heads * heads.head_dim}
    for label, num_rows in wanted.items():
        if rows[label].view.shape[-2] != num_rows:
            return f"{label} has {rows[label].view.shape[-2]} rows where its heads have {num_rows}"
    return None


def _is_cross_attention(name: str, owner: nn.Module) -> bool:
    declared = getattr(owner, "is_cross_attention", None)
    if isinstance(declared, bool):
        return declared
    return any(_CROSS.search(word) for word in (name, *class_names(owner)))


def _rows_of_a_head(site: Site, view: MatrixView) -> int | None:
    label = _label(site, view)
    num_rows = view.shape[-2]
    if label == "k_nope" or (label == "v" and site.leaf == "kv_b_proj"):
        return view.rows.size if view.rows is not None else None  # one run per head
    if label not in ("q", "k", "v", "gate"):
        return None
    # Latent attention has one key per head, even if its config has a different number.
    num_heads, num_key_heads, head_dim = _numbers_of(site.owner)
    special = {"q": (_LATENT_HEAD_DIM,), "v": (_VALUE_HEAD_DIM,)}.get(label, ())
    width = _first(site.owner, special) or head_dim
    count = num_key_heads if label in ("k", "v") else num_heads
    if width is None or count is None:
        return None
    run = num_rows if view.rows is None else view.rows.size
    return width if num_rows == count * width and run % width == 0 else None


def _label(site: Site, view: MatrixView) -> str:
    """Return what a view projects to: q, k, v or the label of a part."""
    if view.name.endswith("]"):
        return view.name[len(site.name) + 1 : -1]
    return _UNKNOWN if looks_fused(site.leaf) else _PROJECTIONS.get(site.leaf, site.leaf)


def _first(holder: Any, names: Sequence[str]) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    # bool is a subclass of int, but not a number of heads. Some configs write 0 for None.
    return next((v for v in values if type(v) is int and v > 0), None)
