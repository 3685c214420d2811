"""Find the weight matrices in a checkpoint's tensors by their names, shapes and the config.

The rules are those of `hf_pss.models.selection`, which reads a model's modules. A fused projection
is divided if the config, or its name and shape, determine the layout. Otherwise it stays one
matrix, with a note.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from hf_pss.models.selection import RowPattern
from hf_pss.models.selection.by_name import (
    ADAPTER_FACTOR,
    Place,
    Steps,
    children_by_module,
    is_adapter_factor,
    is_embedding_name,
    place_of,
    steps_by_name,
    why_no_block_matrix,
    why_no_projection,
)
from hf_pss.models.selection.layouts import (
    CONV1D_LEAVES,
    config_stores_inputs_first,
    layout_by_config,
    looks_fused,
    row_patterns,
)
from hf_pss.runs.safetensors_files import READABLE, Checkpoint, MatrixReader, TensorEntry

_NOT_WEIGHTS = re.compile(r"(?:^|[._])(?:bias|masked_bias|inv_freq|running_mean|running_var)$")
# The path shows that a stack holds experts. In Granite and JetMoE the name of the stack does.
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)|\.(?:input|output)_linear(?:\.weight)?$")
_SCALES = re.compile(r"weight_scale(?:_inv|_2)?$|\.(?:absmax|quant_map|SCB|qzeros|scales)$")
_QUANTISED = "quantised weights and their scales"
SMALL = "bias, norm or scale"
# The limit for all stacks in one checkpoint [ours]. The largest models have about 70,000 experts. A
# small file could claim millions, and each expert costs a record.
MOST_EXPERTS = 2**17


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix, or a stack of experts' matrices, and its place in a tensor."""

    name: str
    """The name of the tensor, with the part in brackets: ``h.0.attn.c_attn.weight[q]``."""
    entry: TensorEntry
    place: Place
    shape: tuple[int, int]
    """(m, n): outputs, inputs."""
    num_experts: int | None
    """None if the tensor is 2-D."""
    transposed: bool
    """Whether the tensor is stored (in, out), as GPT-2's Conv1D does."""
    rows: RowPattern | None
    """The output rows that belong to the matrix; None means all rows."""
    note: str
    """A remark for people if the layout is in doubt; usually empty."""
    why_unselected: str = ""
    """Why `select_matrices` would not select the matrix in a run; empty if it would."""

    @property
    def reader(self) -> MatrixReader:
        """The reader of the matrix's numbers."""
        height, width = self.entry.shape[-2:]
        return MatrixReader(self.entry, (height, width), self.transposed, self.rows)


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's tensors: the matrices to measure, and the others with the reasons."""

    matrices: tuple[StoredMatrix, ...]
    others: tuple[tuple[TensorEntry, str], ...]
    """Floating-point tensors that are only searched for NaN and inf, not measured."""
    unread: tuple[tuple[TensorEntry, str], ...]
    """Tensors that are not read, because their dtype is not in `READABLE`, as of integers."""


def find_matrices(checkpoint: Checkpoint) -> Contents:
    """Sort a checkpoint's tensors. Cost: this reads names and shapes only."""
    rules = _Rules(checkpoint)
    matrices: list[StoredMatrix] = []
    others, unread = [], []
    num_experts = 0
    for entry in checkpoint.tensors:
        steps = steps_by_name(entry.name, rules.children)
        if entry.dtype not in READABLE:
            unread.append((entry, f"{entry.dtype}, quantised or not floating point"))
        elif rules.is_quantised(entry):
            others.append((entry, _QUANTISED))
        elif reason := _why_no_matrix(entry, steps):
            others.append((entry, reason))
        elif num_experts + _num_experts(entry) > MOST_EXPERTS:
            others.append((entry, f"beyond {MOST_EXPERTS:,} experts in all"))
        else:
            num_experts += _num_experts(entry)
            matrices += rules.matrices_of(entry, steps)
    return Contents(tuple(matrices), tuple(others), tuple(unread))


def _why_no_matrix(entry: TensorEntry, steps: Steps) -> str | None:
    if len(entry.shape) < 2 or _NOT_WEIGHTS.search(entry.name):
        return SMALL
    if is_adapter_factor(entry.name):
        return ADAPTER_FACTOR
    if len(entry.shape) > 3:
        return f"{len(entry.shape)}-D"
    if len(entry.shape) == 3 and not _EXPERTS.search(entry.name):
        return "3-D, meaning unknown"
    if min(entry.shape) < 1 or min(entry.shape[-2:]) < 2:
        return "no matrix: a side below 2"
    return why_no_block_matrix(steps) if place_of(entry.name).block is not None else None


def _num_experts(entry: TensorEntry) -> int:
    return entry.shape[0] if len(entry.shape) == 3 else 0


class _Rules:
    """The rules that depend on all tensors of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = checkpoint.config
        self._names = {entry.name for entry in checkpoint.tensors}
        self.children: Mapping[str, frozenset[str]] = children_by_module(self._names)
        plain = [entry for entry in checkpoint.tensors if len(entry.shape) == 2]
        fused = [entry.shape for entry in plain if _leaf(entry.name) == "c_attn"]
        self._inputs_first = config_stores_inputs_first(checkpoint.model_type, fused)
        size = checkpoint.config.get("vocab_size")
        self._vocabularies = {size} if type(size) is int else set()
        self._inputs: defaultdict[tuple[str, int | None], set[int]] = defaultdict(set)
        for entry in plain:
            place = place_of(entry.name)
            if place.block is None and is_embedding_name(steps_by_name(entry.name, {})):
                self._vocabularies.add(entry.shape[0])
            transposed = self._is_transposed(entry, place)
            self._inputs[place.stack, place.block].add(entry.shape[0 if transposed else 1])

    def is_quantised(self, entry: TensorEntry) -> bool:
        """Return whether the tensor holds scales, or numbers that mean nothing without scales."""
        scaled = {f"{entry.name}_scale_inv", f"{entry.name}_scale", f"{entry.name}.absmax"}
        is_scale = entry.dtype == "F8_E8M0" or _SCALES.search(entry.name) is not None
        return is_scale or not scaled.isdisjoint(self._names)

    def matrices_of(self, entry: TensorEntry, steps: Steps) -> list[StoredMatrix]:
        """Return one record for each matrix, or each stack of matrices, in a tensor."""
        leaf, place = _leaf(entry.name), place_of(entry.name)
        *experts, rows, columns = entry.shape
        transposed = self._is_transposed(entry, place)
        if transposed:
            rows, columns = columns, rows
        why = self._why_unselected(entry, place, steps, (*experts, rows, columns)) or ""
        parts = None
        if not experts:
            is_cross = any("crossattention" in name.lower() for name, _ in steps)
            parts = layout_by_config(leaf, rows, columns, self._config, is_cross_attention=is_cross)
        note = ""
        pieces: list[tuple[str, RowPattern | None]] = [("", None)]
        if parts is not None:
            pieces = [(f"[{label}]", pattern) for label, pattern in row_patterns(parts)]
        elif looks_fused(leaf) or (experts and leaf == "input_linear"):
            note = "fused, layout unknown: kept as one matrix"
        return [
            StoredMatrix(
                name=f"{entry.name}{label}",
                entry=entry,
                place=Place(place.stack, place.block, f"{place.kind}{label}"),
                shape=(rows // pattern.period * pattern.size if pattern else rows, columns),
                num_experts=experts[0] if experts else None,
                transposed=transposed,
                rows=pattern,
                note=note,
                why_unselected=why,
            )
            for label, pattern in pieces
        ]

    def _is_transposed(self, entry: TensorEntry, place: Place) -> bool:
        is_conv1d = len(entry.shape) == 2 and _leaf(entry.name) in CONV1D_LEAVES
        return self._inputs_first and is_conv1d and place.block is not None

    def _why_unselected(
        self, entry: TensorEntry, place: Place, steps: Steps, shape: tuple[int, ...]
    ) -> str | None:
        if place.block is None:
            return "outside the repeated blocks"
        if is_embedding_name(steps):
            return "embedding or output head"
        if len(shape) == 2 and not entry.name.endswith((".weight", "_proj_weight")):
            return "2-D parameter, meaning unknown"
        return why_no_projection(
            steps,
            shape,
            vocabularies=self._vocabularies,
            block_inputs=self._inputs[place.stack, place.block],
        )


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
