"""The health of one stored matrix in numbers: σ₁, ‖W‖_F and the ranks that are made of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hf_pss.inspection.header import TensorEntry
from hf_pss.inspection.matrices import StoredMatrix
from hf_pss.inspection.places import Place
from hf_pss.inspection.reading import PIECE_BYTES, MatrixReader, read_pieces
from hf_pss.inspection.streamed import streamed_norms, streamed_spectrum
from hf_pss.linalg import frobenius_norm, noise_stable_rank, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import unit_scaled

__all__ = ["MatrixHealth", "count_nonfinite", "measure", "spectrum_of"]

# Larger matrices are streamed. Quick norms hold three times a matrix at their peak.
WHOLE_BYTES = 3 * PIECE_BYTES


@dataclass(frozen=True, slots=True)
class MatrixHealth:
    """What was measured of one matrix."""

    name: str
    """Experts of a stack are numbered: ``….experts.down_proj[3]``."""
    source: StoredMatrix
    expert: int | None
    sigma1: float
    """NaN where the matrix is not finite, as `frobenius`."""
    frobenius: float
    num_nonfinite: int
    """Numbers that are NaN or inf."""
    spectrum: array[float] | None
    """All singular values, largest first, where they were asked for and the matrix is finite;
    eight bytes each, for a model has millions."""

    @property
    def place(self) -> Place:
        """Kind and block."""
        return self.source.place

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""
        return self.source.shape

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / σ₁²; 0 for the zero matrix, NaN where the matrix is not finite."""
        return (self.frobenius / self.sigma1) ** 2 if self.sigma1 else self.sigma1

    @property
    def noise(self) -> float:
        """mn/(√m + √n)²: the stable rank of i.i.d. noise of its shape."""
        return noise_stable_rank(*self.shape)

    @property
    def effective_rank(self) -> float | None:
        """exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), of the spectrum; NaN where σ₁ is inf."""
        if self.spectrum is None:
            return None
        if not self.spectrum[0]:
            return 0.0
        ratios = [sigma / self.spectrum[0] for sigma in self.spectrum]  # their sum is finite
        total = sum(ratios)
        if math.isnan(total):
            return math.nan
        shares = [ratio / total for ratio in ratios]
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@torch.no_grad()
def measure(matrix: StoredMatrix, *, exact: bool = False) -> Iterator[MatrixHealth]:
    """Measure a matrix, or every matrix of a stack.

    Cost: the matrix is read once, or seven times where it is larger than `WHOLE_BYTES`; at its
    peak four times the lesser of both is held. Quick values err as `quick_stable_rank` says.

    Args:
        matrix: What to read.
        exact: All singular values instead of σ₁ from below.

    Yields:
        One record an expert; one in all where it is no stack.

    Raises:
        StateError: The file has become shorter since its header was read.
    """
    reader = matrix.reader
    num_matrices = 1 if matrix.num_experts is None else matrix.num_experts
    at_once = max(1, WHOLE_BYTES // _bytes(reader))
    for first in range(0, num_matrices, at_once):
        experts = range(first, min(first + at_once, num_matrices))
        found = _exactly(reader, experts) if exact else _quickly(reader, experts)
        for expert, (sigma1, frobenius, spectrum) in zip(experts, found, strict=True):
            stacked = matrix.num_experts is not None
            yield MatrixHealth(
                name=f"{matrix.name}[{expert}]" if stacked else matrix.name,
                source=matrix,
                expert=expert if stacked else None,
                sigma1=sigma1,
                frobenius=frobenius,
                num_nonfinite=_num_bad(reader, expert) if math.isnan(frobenius) else 0,
                spectrum=spectrum,
            )


@torch.no_grad()
def spectrum_of(matrix: StoredMatrix, expert: int | None) -> array[float] | None:
    """Return all singular values of one matrix, largest first; None where it is not finite."""
    reader = matrix.reader
    _, _, spectrum = next(_exactly(reader, range(expert or 0, (expert or 0) + 1)))
    return spectrum


@torch.no_grad()
def count_nonfinite(entry: TensorEntry) -> int:
    """Count NaN and inf in a tensor of any shape; cost: it is read once."""
    wide = torch.float64 if entry.dtype == "F64" else torch.float32  # 1e300 is finite
    return sum(_count(piece.to(wide)) for piece in read_pieces(entry))


_Found: TypeAlias = "tuple[float, float, array[float] | None]"


def _quickly(reader: MatrixReader, experts: range) -> Iterator[_Found]:
    if _bytes(reader) > WHOLE_BYTES:
        for expert in experts:
            sigma1, frobenius = streamed_norms(*reader.tall_pieces(expert))
            yield sigma1, frobenius, None
        return
    stack = _stack(reader, experts)
    norms = frobenius_norm(stack)
    if bool(norms.isinf().any()):  # finite numbers, but a norm beyond float32
        stack = stack.double()
        norms = frobenius_norm(stack)
    tops = spectral_norm(stack, num_rounds=QUICK_ROUNDS)
    for top, norm in zip(tops.tolist(), norms.tolist(), strict=True):
        yield top, norm, None


def _exactly(reader: MatrixReader, experts: range) -> Iterator[_Found]:
    for expert in experts:
        if _num_bad(reader, expert):
            yield math.nan, math.nan, None
            continue
        sigma = _singular_values(reader, expert)
        yield float(sigma[0]), float(torch.linalg.vector_norm(sigma)), array("d", sigma.tolist())


def _singular_values(reader: MatrixReader, expert: int) -> Tensor:
    if _bytes(reader) > WHOLE_BYTES:
        return streamed_spectrum(*reader.tall_pieces(expert, wide_ratio=1))
    scaled = unit_scaled(reader.whole(expert))
    sigma: Tensor = torch.linalg.svdvals(scaled.matrix).double()
    return sigma * scaled.scale.double()


def _stack(reader: MatrixReader, experts: range) -> Tensor:
    if len(experts) == 1:
        return reader.whole(experts[0]).unsqueeze(0)
    return torch.stack([reader.whole(expert) for expert in experts])


def _num_bad(reader: MatrixReader, expert: int) -> int:
    pieces, _ = reader.tall_pieces(expert)
    return sum(_count(piece) for piece in pieces())


def _count(piece: Tensor) -> int:
    return int((~piece.isfinite()).sum())


def _bytes(reader: MatrixReader) -> int:
    height, width = reader.shape
    return height * width * reader.dtype.itemsize
