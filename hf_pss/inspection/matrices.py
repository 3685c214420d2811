"""The weight matrices inside a checkpoint's tensors, told from names, shapes and plain numbers.

`hf_pss.models.selection` asks the model's modules. Here there is no model, so a layout is divided
only where its name and shape leave no doubt, and kept whole, with a note, elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_pss.models.selection import RowPattern
from hf_pss.models.selection.by_name import why_no_block_matrix
from hf_pss.models.selection.layouts import Parts, looks_fused
from hf_pss.models.selection.places import Place, place_of
from hf_pss.runs.safetensors_files import READABLE, Checkpoint, MatrixReader, TensorEntry

__all__ = ["Contents", "StoredMatrix", "find_matrices"]

_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_NOT_WEIGHTS = re.compile(r"(?:^|[._])(?:bias|masked_bias|inv_freq|running_mean|running_var)$")
_LORA = re.compile(r"(?:^|\.)lora_(?:embedding_)?[AB](?:\.|$)|lora_magnitude_vector")
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
_QUANTISED = re.compile(r"weight_scale(?:_inv|_2)?$|\.(?:absmax|quant_map|SCB|qzeros|scales)$")
SMALL = "bias, norm or scale"
# Of stacks, in one checkpoint: the largest models of experts have about 70,000, and a small file
# could claim millions, for each of which a record is kept. Ours.
MOST_EXPERTS = 2**17
_THIRDS = {"in_proj_weight", "qkv", "Wqkv", "c_attn", "qkv_linear"}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix, or a stack of experts' matrices, and where it lies in its tensor."""

    name: str
    """The tensor's, with the part in brackets: ``h.0.attn.c_attn.weight[q]``."""
    entry: TensorEntry
    place: Place
    shape: tuple[int, int]
    """(m, n): outputs, inputs."""
    num_experts: int | None
    """None where the tensor is 2-D."""
    transposed: bool
    """Whether the tensor is stored (in, out), as by GPT-2's Conv1D."""
    rows: RowPattern | None
    """Output rows that belong to it; None for all."""
    note: str
    """What is uncertain about it, for people; mostly empty."""

    @property
    def reader(self) -> MatrixReader:
        """What reads its numbers."""
        height, width = self.entry.shape[-2:]
        return MatrixReader(self.entry, (height, width), self.transposed, self.rows)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds: matrices to measure, and the rest with the reason."""

    matrices: tuple[StoredMatrix, ...]
    others: tuple[tuple[TensorEntry, str], ...]
    """Floating tensors whose spectrum is not asked for; they are searched for NaN and inf."""
    unread: tuple[tuple[TensorEntry, str], ...]
    """Tensors that are not looked at: integers, quantised weights."""


def find_matrices(checkpoint: Checkpoint) -> Contents:
    """Sort a checkpoint's tensors; cost: names only."""
    names = {entry.name for entry in checkpoint.tensors}
    inputs_first = _stores_inputs_first(checkpoint)
    matrices: list[StoredMatrix] = []
    others, unread = [], []
    num_experts = 0
    for entry in checkpoint.tensors:
        if entry.dtype not in READABLE or _is_quantised(entry, names):
            unread.append((entry, f"{entry.dtype}, quantised or not floating point"))
        elif reason := _why_no_matrix(entry):
            others.append((entry, reason))
        elif num_experts + _num_experts(entry) > MOST_EXPERTS:
            others.append((entry, f"beyond {MOST_EXPERTS:,} experts in all"))
        else:
            num_experts += _num_experts(entry)
            matrices += _matrices_of(entry, checkpoint.config, inputs_first)
    return Contents(tuple(matrices), tuple(others), tuple(unread))


def _is_quantised(entry: TensorEntry, names: set[str]) -> bool:
    # Its numbers mean nothing without the scales beside it.
    scaled = {f"{entry.name}_scale_inv", f"{entry.name}_scale", f"{entry.name}.absmax"}
    return not scaled.isdisjoint(names) or _QUANTISED.search(entry.name) is not None


def _why_no_matrix(entry: TensorEntry) -> str | None:
    if len(entry.shape) < 2 or _NOT_WEIGHTS.search(entry.name):
        return SMALL
    if _LORA.search(entry.name):
        return "LoRA factor: the matrix is the product"
    if len(entry.shape) > 3:
        return f"{len(entry.shape)}-D"
    if len(entry.shape) == 3 and not _EXPERTS.search(entry.name):
        return "3-D, meaning unknown"
    if min(entry.shape) < 1 or min(entry.shape[-2:]) < 2:
        return "no matrix: a side below 2"
    place = place_of(entry.name)
    if place.block is None:
        return None
    return why_no_block_matrix((name, "") for name in reversed(place.kind.split(".")))


def _num_experts(entry: TensorEntry) -> int:
    return entry.shape[0] if len(entry.shape) == 3 else 0


def _stores_inputs_first(checkpoint: Checkpoint) -> bool:
    if checkpoint.model_type in _CONV1D_TYPES:
        return True
    # Without a config: c_attn makes three outputs of one input, so its long side tells.
    fused = [e.shape for e in checkpoint.tensors if _leaf(e.name) == "c_attn" and len(e.shape) == 2]
    return bool(fused) and all(3 * shape[0] == shape[1] for shape in fused)


def _matrices_of(
    entry: TensorEntry, config: Mapping[str, Any], inputs_first: bool
) -> list[StoredMatrix]:
    leaf, place = _leaf(entry.name), place_of(entry.name)
    *experts, rows, columns = entry.shape
    transposed = inputs_first and leaf in _CONV1D_LEAVES and place.block is not None and not experts
    if transposed:
        rows, columns = columns, rows
    num_experts = experts[0] if experts else None
    parts = None if experts else _parts(leaf, rows, columns, config)
    if parts is None:
        note = "fused, layout unknown: kept as one matrix" if _is_fused(leaf, experts) else ""
        whole = (rows, columns)
        return [StoredMatrix(entry.name, entry, place, whole, num_experts, transposed, None, note)]
    period, start, found = sum(size for _, size in parts), 0, []
    for label, size in parts:
        of_part = Place(place.stack, place.block, f"{place.kind}[{label}]")
        shape = (rows // period * size, columns)
        pattern = RowPattern(start, size, period)
        name = f"{entry.name}[{label}]"
        found.append(StoredMatrix(name, entry, of_part, shape, None, transposed, pattern, ""))
        start += size
    return found


def _parts(leaf: str, rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    """Divide output rows as `models/selection/layouts` does, where no module is needed."""
    if leaf in _THIRDS and rows == 3 * columns and not _is_bigcode(config):
        return tuple((label, columns) for label in "qkv")
    if leaf == "gate_up_proj" and rows % 2 == 0:
        return ("gate", rows // 2), ("up", rows // 2)
    if leaf == "query_key_value" and config.get("model_type") in ("gpt_neox", "bloom"):
        heads = _number(config, "num_attention_heads") or _number(config, "n_head")
        if heads and rows == 3 * columns and columns % heads == 0:
            return tuple((label, columns // heads) for label in "qkv")
    if leaf == "qkv_proj" and config.get("model_type") in ("phi3", "phi4_multimodal"):
        return _grouped_query(rows, columns, config)
    return None


def _grouped_query(rows: int, columns: int, config: Mapping[str, Any]) -> Parts | None:
    heads = _number(config, "num_attention_heads")
    groups = _number(config, "num_key_value_heads") or heads
    if not heads or not groups:
        return None
    width = _number(config, "head_dim") or columns // heads
    q, kv = heads * width, groups * width
    return (("q", q), ("k", kv), ("v", kv)) if min(q, kv) > 0 and q + 2 * kv == rows else None


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def _is_bigcode(config: Mapping[str, Any]) -> bool:
    # Its c_attn is divided per head, or shares one key and value: (3n, n) does not say which.
    return config.get("model_type") == "gpt_bigcode"


def _is_fused(leaf: str, experts: list[int]) -> bool:
    return looks_fused(leaf) or (bool(experts) and "gate_up" in leaf)


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
