"""The health of a checkpoint: every matrix measured and judged, all other numbers searched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_pss.errors import SelectionError
from hf_pss.inspection.checkpoint import Checkpoint
from hf_pss.inspection.header import TensorEntry
from hf_pss.inspection.judge import JudgedMatrix, judge
from hf_pss.inspection.matrices import find_matrices
from hf_pss.inspection.measure import MatrixHealth, count_nonfinite, measure
from hf_pss.inspection.names import visible

__all__ = ["Inspection", "Progress", "inspect_checkpoint"]

Progress = Callable[[int, str], None]
"""Told the bytes just done and the tensor's name, fit to be shown."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a checkpoint."""

    checkpoint: Checkpoint
    exact: bool
    matrices: tuple[JudgedMatrix, ...]
    """The worst first."""
    bad_others: tuple[tuple[TensorEntry, int], ...]
    """Biases, norms and the like that hold NaN or inf, and how many."""
    others: tuple[tuple[TensorEntry, str], ...]
    """Floating tensors that are no matrices, and why; all were searched."""
    unread: tuple[tuple[TensorEntry, str], ...]
    """Tensors that were not looked at, and why."""

    @property
    def is_finite(self) -> bool:
        """Whether no number that was read is NaN or inf."""
        return not self.bad_others and not any(one.health.num_nonfinite for one in self.matrices)

    @property
    def is_lost(self) -> bool:
        """Whether no number that was read is finite: nothing of it can be used."""
        found = [one.health for one in self.matrices]
        num_bad = sum(one.num_nonfinite for one in found) + sum(bad for _, bad in self.bad_others)
        num_read = sum(math.prod(one.shape) for one in found)
        num_read += sum(math.prod(entry.shape) for entry, _ in self.others)
        return 0 < num_bad == num_read

    @property
    def num_findings(self) -> int:
        """Matrices that something speaks against."""
        return sum(bool(one.findings) for one in self.matrices)


def inspect_checkpoint(
    checkpoint: Checkpoint, *, exact: bool = False, progress: Progress | None = None
) -> Inspection:
    """Measure every matrix and search every other tensor, one at a time.

    Cost: the checkpoint is read once, matrices above `WHOLE_BYTES` seven times. Memory: below 1 GiB
    beyond the interpreter's own; the tests measure it.

    Args:
        checkpoint: What `open_checkpoint` found.
        exact: All singular values, by SVD: minutes where quick values take seconds.
        progress: Told after each tensor.

    Raises:
        SelectionError: Nothing in it can be read: all is quantised.
        StateError: A file has become shorter since its header was read.
    """
    contents = find_matrices(checkpoint)
    if not contents.matrices and not contents.others:
        raise SelectionError(
            f"Of the {len(checkpoint.tensors)} tensors of {visible(checkpoint.path)} none is of a "
            "floating type that can be read without scales. Give the checkpoint before it was "
            "quantised."
        )
    told = progress or (lambda num_bytes, name: None)
    for entry, _ in contents.unread:
        told(entry.num_bytes, visible(entry.name))
    bad = []
    for entry, _ in contents.others:
        if num_bad := count_nonfinite(entry):
            bad.append((entry, num_bad))
        told(entry.num_bytes, visible(entry.name))
    measured: list[MatrixHealth] = []
    for matrix in contents.matrices:
        measured += measure(matrix, exact=exact)
        size = matrix.rows.size / matrix.rows.period if matrix.rows else 1.0
        told(round(matrix.entry.num_bytes * size), visible(matrix.name))
    return Inspection(
        checkpoint=checkpoint,
        exact=exact,
        matrices=judge(measured),
        bad_others=tuple(bad),
        others=contents.others,
        unread=contents.unread,
    )
