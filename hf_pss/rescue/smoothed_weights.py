"""Smooth the weights of a safetensors file and write them to another file, without the model.

The header is copied byte for byte, so names, dtypes, order and metadata are unchanged. The file
holds tied tensors only once. The smoothed matrices are those that `select_matrices` would choose in
a run. They are read, smoothed and written one tensor at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.inspection.matrices import StoredMatrix, find_matrices
from hf_pss.linalg import SMOOTHING_FUNCTIONS, SmoothingFunction, StableRankCap, smooth_spectrum
from hf_pss.models.selection.by_name import is_adapter_factor
from hf_pss.records.strict_json import visible
from hf_pss.runs.safetensors_files import PIECE_BYTES, READABLE, Checkpoint, TensorEntry

__all__ = ["Repair", "matrices_to_smooth", "summary", "write_weights"]

_SMOOTHABLE = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True, slots=True)
class Repair:
    """The effect of smoothing on one matrix."""

    name: str
    changed: bool
    sigma_before: float
    """The largest singular value σ₁ before smoothing."""
    sigma_after: float
    stable_rank_before: float
    stable_rank_after: float


def matrices_to_smooth(checkpoint: Checkpoint) -> tuple[StoredMatrix, ...]:
    """Return the matrices that a run would smooth.

    Raises:
        ConfigurationError: The weights belong to a LoRA adapter, or no such matrix exists.
    """
    if any(is_adapter_factor(entry.name) for entry in checkpoint.tensors):
        raise ConfigurationError(
            f"{visible(checkpoint.path)} holds LoRA factors. Only a run can smooth their product. "
            "Give --smoothing none, or use the command that is printed without --write."
        )
    found = tuple(
        matrix
        for matrix in find_matrices(checkpoint).matrices
        if not matrix.why_unselected and matrix.entry.dtype in _SMOOTHABLE
    )
    if not found:
        raise ConfigurationError(
            f"{visible(checkpoint.path)} holds no matrix that smoothing applies to. Give "
            "--smoothing none."
        )
    return found


def write_weights(
    checkpoint: Checkpoint, folder: Path, target: Path, smoothing: str
) -> list[Repair]:
    """Smooth the weights of a checkpoint, and write all weight files below `target`.

    The function needs about five times the memory of the largest tensor.

    Args:
        checkpoint: The checked headers.
        folder: The folder of the checkpoint. Files keep their path relative to it.
        target: An existing folder to write to.
        smoothing: ``floor`` (the stable rank of noise), the name of a function, or ``none``.

    Returns:
        The effect on each matrix, in the order of the file.

    Raises:
        ConfigurationError: `matrices_to_smooth` finds no matrices to smooth.
        StateError: A file has changed while it was read, or a matrix cannot be decomposed.
        NonFiniteError: A matrix holds NaN or inf.
        OSError: A file could not be read or written.
    """
    views: defaultdict[str, list[StoredMatrix]] = defaultdict(list)
    if smoothing != "none":
        for matrix in matrices_to_smooth(checkpoint):
            views[matrix.entry.name].append(matrix)
    files: defaultdict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in checkpoint.tensors:
        files[entry.path].append(entry)
    repairs: list[Repair] = []
    for path, entries in files.items():
        out = target / path.relative_to(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, out.open("xb") as sink:
            _copy(source, sink, entries[0].offset, path)
            for entry in entries:
                if entry.name not in views:
                    _copy(source, sink, entry.num_bytes, path)
                    continue
                tensor = _read(source, entry)
                for matrix in views[entry.name]:
                    repairs += _smooth_(tensor, matrix, smoothing)
                sink.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return repairs


def _smooth_(tensor: Tensor, matrix: StoredMatrix, smoothing: str) -> list[Repair]:
    """Smooth one matrix, or each matrix of a stack, in place inside its tensor."""
    rows = None if matrix.rows is None else matrix.rows.stored_rows(matrix.shape[0])
    axis = -1 if matrix.transposed else -2
    experts = range(matrix.num_experts) if matrix.num_experts is not None else (None,)
    found = []
    for expert in experts:
        whole = tensor if expert is None else tensor[expert]
        part = whole if rows is None else whole.index_select(axis, rows)
        name = matrix.name if expert is None else f"{matrix.name}[{expert}]"
        phi = _function(smoothing, matrix.shape)
        try:
            done = smooth_spectrum(part, phi, max_rank=PSSConfig().max_rank)
        except LinAlgError as error:
            raise StateError(
                f"{visible(name)} cannot be decomposed. Choose an earlier checkpoint."
            ) from error
        if bool(done.changed):
            edited = done.weight
            if not bool(edited.isfinite().all()):
                raise NonFiniteError(f"{visible(name)} is not finite after smoothing.")
            if rows is None:
                whole.copy_(edited)
            else:
                whole.index_copy_(whole.ndim + axis, rows, edited)
        found.append(
            Repair(
                name=name,
                changed=bool(done.changed),
                sigma_before=float(done.sigma_before[0]),
                sigma_after=float(done.spectral_norm_after),
                stable_rank_before=float(done.stable_rank_before),
                stable_rank_after=float(done.stable_rank_after),
            )
        )
    return found


def _function(smoothing: str, shape: tuple[int, int]) -> SmoothingFunction:
    if smoothing == "floor":
        return StableRankCap()  # the default level is that of noise of the same shape
    return SMOOTHING_FUNCTIONS[smoothing]()


def _read(source: BinaryIO, entry: TensorEntry) -> Tensor:
    raw = source.read(entry.num_bytes)
    if len(raw) < entry.num_bytes:
        raise _shorter(entry.path)
    # torch.frombuffer needs writable memory, so the bytes are copied into a bytearray.
    return torch.frombuffer(bytearray(raw), dtype=READABLE[entry.dtype]).view(entry.shape)


def _copy(source: BinaryIO, sink: BinaryIO, num_bytes: int, path: Path) -> None:
    left = num_bytes
    while left:
        piece = source.read(min(left, PIECE_BYTES))
        if not piece:
            raise _shorter(path)
        sink.write(piece)
        left -= len(piece)


def _shorter(path: Path) -> StateError:
    return StateError(f"{visible(path)} became shorter while it was read.")


def summary(repairs: Sequence[Repair]) -> str:
    """Return a sentence about the effect of smoothing."""
    changed = [one for one in repairs if one.changed]
    if not changed:
        return f"None of {len(repairs)} matrices needed a change."
    worst = max(changed, key=lambda one: math.log(one.sigma_before / one.sigma_after))
    return (
        f"{len(changed)} of {len(repairs)} matrices were smoothed; most of all "
        f"{visible(worst.name)}: σ₁ {worst.sigma_before:.3g} → {worst.sigma_after:.3g}, stable "
        f"rank {worst.stable_rank_before:.3g} → {worst.stable_rank_after:.3g}."
    )
