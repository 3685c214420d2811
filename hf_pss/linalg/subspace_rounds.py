"""Single rounds of subspace iteration on WᵀW, as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# In units of ‖W‖_F² and of a row's length. It is far above the rounding of fp32.
_LOST = 1e-5


def ritz_round(vectors: Tensor, images: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Do one round of subspace iteration on WᵀW, given its products with the vectors.

    Args:
        vectors: (N, k, c), orthonormal rows, k at most 2, float32 or float64: V.
        images: (N, k, c): WᵀWV.
        squares: (N,): ‖W‖_F².

    Returns:
        Two tensors. The first holds the new vectors, an orthonormal basis of WᵀWV. They are the old
        ones if WᵀWV is zero or not finite. The second is (N, 3) in float64: ‖WᵀWz‖/‖Wz‖ of the Ritz
        vector z, ‖W‖_F and the residual. The first and the last number are NaN if an input is not
        finite. ‖W‖_F is always √squares. The residual is 1 if a nonzero matrix maps z to zero.

    >>> w = torch.diag(torch.tensor([2.0, 1.0]))
    >>> v = torch.eye(2)[None]
    >>> ritz_round(v, v @ w.mT @ w, torch.tensor([5.0]))[1].tolist()
    [[2.0, 2.23606797749979, 0.0]]
    """
    # A matrix may be far from its last scale. The squares of its images must not overflow.
    peak = images.abs().amax(dim=(-2, -1))  # NaN if one of them is NaN
    is_finite = peak.isfinite() & squares.isfinite()
    clean = torch.where(is_finite[:, None, None], images, 0.0)
    peak = torch.where(is_finite & (peak > 0), peak, 1.0)
    z, w = _rotated(vectors, clean / peak[:, None, None])
    ritz = (z[:, 0] * w[:, 0]).sum(dim=-1).clamp_min(0.0)
    length = torch.linalg.vector_norm(w[:, 0], dim=-1)
    is_seen = ritz > 0
    divisor = torch.where(is_seen, ritz, 1.0)
    # If a Ritz value is pure rounding, its quotient has no meaning.
    sigma = torch.where(is_seen, length / divisor.sqrt() * peak.sqrt(), 0.0)
    off = torch.linalg.vector_norm(w[:, 0] - ritz[:, None] * z[:, 0], dim=-1)
    residual = torch.where(is_seen, off / divisor, (squares > 0).to(ritz.dtype))
    sigma, residual = (torch.where(is_finite, x, torch.nan) for x in (sigma, residual))
    found = torch.stack([sigma.double(), squares.double().sqrt(), residual.double()], dim=-1)
    moved = orthonormal_pairs(w, z)
    return torch.where((is_finite & is_seen)[:, None, None], moved, vectors), found


def _rotated(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Ritz vectors and their images, the one with the larger value first."""
    if vectors.shape[1] == 1:
        return vectors, images
    core = vectors @ images.mT
    a, d = core[:, 0, 0], core[:, 1, 1]
    b = (core[:, 0, 1] + core[:, 1, 0]) / 2
    # This rotation diagonalises a symmetric 2 × 2 matrix. eigh would read from the device.
    angle = torch.atan2(2 * b, a - d) / 2
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return rotation @ vectors, rotation @ images


def orthonormal_pairs(w: Tensor, z: Tensor) -> Tensor:
    """Return an orthonormal basis of each one or two rows, by Gram–Schmidt.

    Args:
        w: (N, k, c), k at most 2, float32 or float64.
        z: (N, k, c), orthonormal rows, which replace rows that are zero or parallel.
    """
    unit = _unit(w, z)
    first = unit[:, 0]
    if w.shape[1] == 1:
        return unit
    left = _without(unit[:, 1], first)
    is_lost = torch.linalg.vector_norm(left, dim=-1, keepdim=True) < 1e-3
    left = torch.where(is_lost, _without(z[:, 1], first), left)
    # The first subtraction may leave rounding of a row that was nearly parallel.
    second = _unit(_without(left, first), z[:, 1])
    return torch.stack([first, second], dim=1)


def _without(vector: Tensor, unit: Tensor) -> Tensor:
    return vector - (vector * unit).sum(dim=-1, keepdim=True) * unit


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(length > 0, vector / torch.where(length > 0, length, 1.0), otherwise)


def orthonormal_rows(block: Tensor, basis: Tensor, filler: Tensor) -> Tensor:
    """Return orthonormal rows that are orthogonal to the rows of the basis.

    If a row is zero or lies in the span of the basis, only rounding remains of it. After some
    rounds this rounding also lies in the span. The row of the filler then replaces it.
    """
    length = torch.linalg.vector_norm(block, dim=-1, keepdim=True)
    block = block / length.clamp_min(torch.finfo(block.dtype).tiny)
    rest = block - (block @ basis.mT) @ basis
    is_lost = (torch.linalg.vector_norm(rest, dim=-1, keepdim=True) < _LOST) | (length < _LOST)
    block = torch.where(is_lost, filler, rest)
    for _ in range(2):
        block = block - (block @ basis.mT) @ basis
        block = torch.linalg.qr(block.mT).Q.mT
    return block
