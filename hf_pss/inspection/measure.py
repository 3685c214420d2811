"""σ₁, ‖W‖_F, ranks and spectra of a stored matrix.

`hf_pss.linalg` measures matrices that fit into memory. A larger matrix is read in pieces
A_i of rows. A pass over the rows computes AᵀAX as Σ A_iᵀ(A_i X), so one pass is one round
of the iteration.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hf_pss.inspection.matrices import StoredMatrix
from hf_pss.linalg import frobenius_norm, noise_stable_rank, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.linalg.triplets import product
from hf_pss.models.selection.by_name import Place
from hf_pss.runs.safetensors_files import PIECE_BYTES, MatrixReader

Pieces: TypeAlias = Callable[[], Iterable[Tensor]]
"""A function that iterates once over the rows of one matrix, as (rows, n) float32 or float64."""

_BLOCK = 4
_SEED = 20260201
# Both 2^e and 2^-e must be normal fp32 numbers, as in `hf_pss.linalg.scaling`.
_MAX_EXPONENT = 126


def streamed_norms(pieces: Pieces, num_columns: int) -> tuple[float, float]:
    """Return a lower estimate of σ₁, as `spectral_norm` gives it in five rounds, and ‖A‖_F.

    The method is Rayleigh–Ritz on the Krylov space of AᵀA (Musco & Musco 2015, arXiv 1504.05477).
    Its fp32 products are accurate enough for σ₁, but not for values below 3e-4 σ₁. Cost: seven
    passes. Memory: two pieces and 48 columns.

    Args:
        pieces: The matrix.
        num_columns: n.

    Returns:
        σ₁ and ‖A‖_F. Both are NaN if the matrix holds NaN or inf, and 0 if the matrix is zero.
    """
    scale = _scale(pieces)
    if not math.isfinite(scale) or scale == 0:
        return scale, scale
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(num_columns, _BLOCK, generator=generator)
    whole_space = num_columns <= _BLOCK * (QUICK_ROUNDS + 1)
    basis = torch.eye(num_columns).double() if whole_space else _orthonormal(start.double())
    block = basis
    for _ in range(0 if whole_space else QUICK_ROUNDS):
        image = torch.zeros_like(block)
        for piece in pieces():
            unit = piece / scale
            image += product(unit.mT, product(unit, block.to(unit.dtype)))
        block = _orthonormal(image, basis)
        basis = torch.cat([basis, block], dim=1)
    gram = basis.new_zeros(basis.shape[1], basis.shape[1])
    total = 0.0
    for piece in pieces():
        unit = piece / scale
        total += float(unit.square().sum(dtype=torch.float64))
        part = product(unit, basis.to(unit.dtype)).double()
        gram += part.mT @ part
    sigma1 = math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))
    return scale * sigma1, scale * math.sqrt(total)


def streamed_spectrum(pieces: Pieces, num_columns: int) -> Tensor:
    """Return all singular values, largest first, from the Gram matrix of the columns in fp64.

    Values below 1e-8 of the largest are rounding errors, because the square halves the number of
    digits. Cost: two passes, O(mn²) operations and one decomposition of an (n, n) fp64 matrix.
    Memory for 8192 columns: 512 MiB for that matrix, and the same again for the decomposition.

    Args:
        pieces: A finite matrix with at least as many rows as columns.
        num_columns: n.
    """
    scale = _scale(pieces) or 1.0
    gram = torch.zeros(num_columns, num_columns, dtype=torch.float64)
    for piece in pieces():
        unit = (piece / scale).double()
        gram += unit.mT @ unit
    sigma: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt() * scale
    return sigma


def _scale(pieces: Pieces) -> float:
    """Return the power of two above the largest magnitude; NaN if a number is not finite."""
    largest = 0.0
    for piece in pieces():
        found = float(piece.abs().amax())
        if not math.isfinite(found):
            return math.nan
        largest = max(largest, found)
    if largest == 0:
        return 0.0
    exponent = math.frexp(largest)[1]
    return math.ldexp(1.0, min(max(exponent, -_MAX_EXPONENT), _MAX_EXPONENT))


def _orthonormal(block: Tensor, basis: Tensor | None = None) -> Tensor:
    for _ in range(2):  # one pass may leave rounding errors within the span
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        q: Tensor = torch.linalg.qr(block).Q
        block = q
    return block


# Larger matrices are streamed. Quick norms need at most three times the memory of the matrix.
WHOLE_BYTES = 3 * PIECE_BYTES


@dataclass(frozen=True, slots=True)
class MatrixHealth:
    """The measured numbers of one matrix."""

    name: str
    """The name. Experts of a stack are numbered: ``….experts.down_proj[3]``."""
    source: StoredMatrix
    expert: int | None
    sigma1: float
    """The largest singular value. It is NaN if the matrix is not finite, as `frobenius` is."""
    frobenius: float
    num_nonfinite: int
    """Number of entries that are NaN or inf."""
    spectrum: array[float] | None
    """All singular values, largest first; None without `exact`, or if the matrix is not finite. An
    array needs only eight bytes per value, and a model has millions of values."""

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
        """‖W‖_F² / σ₁²; 0 for the zero matrix, NaN if the matrix is not finite."""
        return (self.frobenius / self.sigma1) ** 2 if self.sigma1 else self.sigma1

    @property
    def noise(self) -> float:
        """mn/(√m + √n)²: the stable rank of i.i.d. noise of the same shape."""
        return noise_stable_rank(*self.shape)

    @property
    def effective_rank(self) -> float | None:
        """exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), of the spectrum; NaN if σ₁ is inf."""
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

    Cost: this reads the matrix once, or seven times if it is larger than `WHOLE_BYTES`. Memory: at
    most four times the size of the matrix or stack, or of `WHOLE_BYTES` if that is smaller. Quick
    values have the error of `quick_stable_rank`.

    Args:
        matrix: The matrix, or stack of matrices, to read.
        exact: Compute all singular values instead of σ₁ from below.

    Yields:
        One record for each expert of a stack, or one record for a single matrix.

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
            is_stacked = matrix.num_experts is not None
            yield MatrixHealth(
                name=f"{matrix.name}[{expert}]" if is_stacked else matrix.name,
                source=matrix,
                expert=expert if is_stacked else None,
                sigma1=sigma1,
                frobenius=frobenius,
                num_nonfinite=_num_bad(reader, expert) if math.isnan(frobenius) else 0,
                spectrum=spectrum,
            )


@torch.no_grad()
def spectrum_of(matrix: StoredMatrix, expert: int | None) -> array[float] | None:
    """Return all singular values of one matrix, largest first; None if it is not finite."""
    first = expert or 0
    return next(_exactly(matrix.reader, range(first, first + 1)))[2]


_Found: TypeAlias = "tuple[float, float, array[float] | None]"


def _quickly(reader: MatrixReader, experts: range) -> Iterator[_Found]:
    if _bytes(reader) > WHOLE_BYTES:
        for expert in experts:
            sigma1, frobenius = streamed_norms(*reader.tall_pieces(expert))
            yield sigma1, frobenius, None
        return
    if len(experts) == 1:
        stack = reader.whole(experts[0])[None]  # not copied
    else:
        stack = torch.stack([reader.whole(expert) for expert in experts])
    norms = frobenius_norm(stack)
    if bool(norms.isinf().any()):  # the entries are finite, but their norm exceeds float32
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
        if _bytes(reader) > WHOLE_BYTES:
            sigma = streamed_spectrum(*reader.tall_pieces(expert, wide_ratio=1))
        else:
            scaled = unit_scaled(reader.whole(expert))
            sigma = torch.linalg.svdvals(scaled.matrix).double() * scaled.scale.double()
        yield float(sigma[0]), float(torch.linalg.vector_norm(sigma)), array("d", sigma.tolist())


def _num_bad(reader: MatrixReader, expert: int) -> int:
    pieces, _ = reader.tall_pieces(expert)
    return sum(int((~piece.isfinite()).sum()) for piece in pieces())


def _bytes(reader: MatrixReader) -> int:
    height, width = reader.shape
    return height * width * reader.dtype.itemsize
