"""Norms and singular values of matrices that are too large to hold: pass by pass over their rows.

The same quantities as `hf_pss.linalg` computes of a matrix in memory; here AᵀA is applied as
Σ A_iᵀ(A_i X) over pieces A_i of rows, so that one pass makes one round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from hf_pss.linalg.krylov import product
from hf_pss.linalg.norms import QUICK_ROUNDS

__all__ = ["Pieces", "streamed_norms", "streamed_spectrum"]

Pieces: TypeAlias = Callable[[], Iterable[Tensor]]
"""Each call goes over the rows of one matrix once: (rows, n) float32 or float64, in order."""

_BLOCK = 4
_SEED = 20260201
# Both 2^e and 2^-e must be normal fp32 numbers, as in `hf_pss.linalg.scaling`.
_MAX_EXPONENT = 126


def streamed_norms(pieces: Pieces, num_columns: int) -> tuple[float, float]:
    """Return σ₁ from below, as `spectral_norm` does in five rounds, and ‖A‖_F.

    Rayleigh–Ritz on the Krylov space of AᵀA (Musco & Musco 2015, arXiv 1504.05477), whose fp32
    products suffice for σ₁, though not for what lies below 3e-4 of it.
    Cost: seven passes; memory: two pieces and 48 columns.

    Args:
        pieces: The matrix.
        num_columns: n.

    Returns:
        σ₁ and ‖A‖_F; both NaN where the matrix holds NaN or inf, both 0 where it is zero.
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

    A value below 1e-8 of the largest is rounding: squaring halves the digits. Cost: two passes,
    O(mn²) and one decomposition of (n, n) fp64, which is what it holds: 512 MiB, and as much again
    to work with, for 8192 columns.

    Args:
        pieces: A finite matrix, no wider than high.
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
    """The power of two next above the largest magnitude; NaN where a number is not finite."""
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
    for _ in range(2):  # the first time rounding may be left within the span
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        q: Tensor = torch.linalg.qr(block).Q
        block = q
    return block
