"""Smooth the weights of a safetensors file and write them to another file, without the model.

The file is copied first, and then the smoothed tensors are written into the copy. Names, dtypes,
order and metadata are therefore unchanged. The file holds tied tensors only once. The smoothed
matrices are those that `select_matrices` would choose in a run. They are read, smoothed and written
one tensor at a time.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.inspection.matrices import StoredMatrix, find_matrices
from hf_pss.linalg import SMOOTHING_FUNCTIONS, StableRankCap, smooth_spectrum
from hf_pss.models.selection.by_name import is_adapter_factor
from hf_pss.records.strict_json import visible
from hf_pss.runs.safetensors_files import Checkpoint, read_pieces
from hf_pss.view.numbers import plural

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
        ConfigurationError: The weights belong to a LoRA adapter, or a run would smooth nothing.
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
    matrices = () if smoothing == "none" else matrices_to_smooth(checkpoint)
    copies: dict[Path, Path] = {}
    for path in dict.fromkeys(entry.path for entry in checkpoint.tensors):
        copies[path] = target / path.relative_to(folder)
        copies[path].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copies[path])
    repairs: list[Repair] = []
    for entry, parts in itertools.groupby(matrices, key=attrgetter("entry")):
        tensor = torch.cat(tuple(read_pieces(entry))).view(entry.shape)
        for matrix in parts:
            repairs += _smooth_(tensor, matrix, smoothing)
        with copies[entry.path].open("r+b") as sink:
            sink.seek(entry.offset)
            sink.write(tensor.flatten().view(torch.uint8).numpy().data)
    return repairs


def _smooth_(tensor: Tensor, matrix: StoredMatrix, smoothing: str) -> list[Repair]:
    """Smooth one matrix, or each matrix of a stack, in place inside its tensor."""
    rows = None if matrix.rows is None else matrix.rows.stored_rows(matrix.shape[0])
    axis = -1 if matrix.transposed else -2
    # The default level of the cap is that of noise of the same shape.
    phi = StableRankCap() if smoothing == "floor" else SMOOTHING_FUNCTIONS[smoothing]()
    is_stack = matrix.num_experts is not None
    found = []
    for expert, whole in enumerate(tensor.unbind() if is_stack else [tensor]):
        part = whole if rows is None else whole.index_select(axis, rows)
        name = f"{matrix.name}[{expert}]" if is_stack else matrix.name
        try:
            done = smooth_spectrum(part, phi, max_rank=PSSConfig().max_rank)
        except LinAlgError as error:
            raise StateError(
                f"{visible(name)} cannot be decomposed. Choose an earlier checkpoint."
            ) from error
        if bool(done.changed):
            if not bool(done.weight.isfinite().all()):
                raise NonFiniteError(f"{visible(name)} is not finite after smoothing.")
            if rows is None:
                whole.copy_(done.weight)
            else:
                whole.index_copy_(axis, rows, done.weight)
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


def summary(repairs: Sequence[Repair]) -> str:
    """Return a sentence about the effect of smoothing."""
    changed = [one for one in repairs if one.changed]
    if not changed:
        return f"No change was needed in {plural(len(repairs), 'matrix', 'matrices')}."
    worst = max(changed, key=lambda one: math.log(one.sigma_before / one.sigma_after))
    matrices = plural(len(repairs), "matrix", "matrices")
    return (
        f"Smoothing changed {len(changed)} of {matrices}, most of all {visible(worst.name)}: "
        f"σ₁ {worst.sigma_before:.3g} → {worst.sigma_after:.3g}, stable "
        f"rank {worst.stable_rank_before:.3g} → {worst.stable_rank_after:.3g}."
    )
