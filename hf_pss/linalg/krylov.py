"""Block Krylov spaces with orthonormal bases on both sides, for quick norms and triplets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 20260201
# In units of ε and a column's norm. If less than this remains of the column, it is only rounding.
_ROUNDING = 10


@dataclass(frozen=True, slots=True)
class KrylovSpace:
    """Bases of V = span{X, (WᵀW)X, …, (WᵀW)^q X} and U = WV, and W between them: WV = U·core."""

    u: Tensor
    """(..., m, K), with orthonormal columns."""
    core: Tensor
    """(..., K, K): UᵀWV. Its singular values are the Ritz values."""
    v: Tensor
    """(..., n, K), with orthonormal columns."""


def krylov_space(tall: Tensor, start: Tensor, num_rounds: int) -> KrylovSpace:
    """Bidiagonalise W by blocks, and keep each new block orthogonal to all previous ones.

    This is block Golub–Kahan–Lanczos (Golub, Luk & Overton 1981, ACM TOMS 7(2)) with full
    re-orthogonalisation. W is multiplied once by each block of V. Wᵀ is multiplied once by each
    block of U except the last one.

    Args:
        tall: (..., m, n), float32 or float64, m >= n, of unit scale.
        start: (..., n, b): X.
        num_rounds: q. If the space becomes complete earlier, fewer rounds are made.
    """
    m, n = tall.shape[-2:]
    width = start.shape[-1]
    num_blocks = 1 + min(num_rounds, n // width - 1)
    fill_u, fill_v = _normal(tall, m, width), _normal(tall, n, width)
    u, image = (tall.new_empty(*tall.shape[:-1], num_blocks * width) for _ in range(2))
    v = tall.new_empty(*tall.shape[:-2], n, num_blocks * width)
    block = torch.linalg.qr(start).Q
    for done in range(0, num_blocks * width, width):
        new = slice(done, done + width)
        if done > 0:
            block = _orthonormal(block, v[..., :done], fill_v.roll(done, dims=-2))
        v[..., new], image[..., new] = block, product(tall, block)
        u[..., new] = _orthonormal(image[..., new], u[..., :done], fill_u.roll(done, dims=-2))
        # Multiply Wᵀ by an orthonormal block, not by W V. In fp32 WᵀW would lose every direction
        # below 3e-4 of σ₁, which contains the rest of a collapsed matrix.
        if new.stop < num_blocks * width:
            block = product(tall.mT, u[..., new])
    return KrylovSpace(u=u, core=u.mT @ image, v=v)


def cold_start(weight: Tensor, num_columns: int) -> Tensor:
    """Return a normal block (..., n, b), the same at every call, without torch's global RNG."""
    n = weight.shape[-1]
    return _normal(weight, n, min(num_columns, n)).expand(*weight.shape[:-2], -1, -1)


def _normal(weight: Tensor, num_rows: int, num_columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    block = torch.randn(num_rows, num_columns, generator=generator)
    # A blocking copy from pageable memory would synchronise the host with the device.
    return block.to(weight.device, weight.dtype, non_blocking=True)


def product(matrix: Tensor, block: Tensor) -> Tensor:
    """Return W X as (XᵀWᵀ)ᵀ.

    On a CPU this is up to three times as fast for a narrow X, and it gives LAPACK's column order.
    """
    return (block.mT @ matrix.mT).mT


def _orthonormal(block: Tensor, basis: Tensor, filler: Tensor) -> Tensor:
    # If a column is in the span of the basis, only rounding remains of it, so a random
    # direction replaces it. The projection is repeated because the first one may leave
    # rounding within the span.
    limit = _ROUNDING * torch.finfo(block.dtype).eps * block.norm(dim=-2)
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    left = torch.linalg.qr(block, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    block = torch.where((left <= limit).unsqueeze(-2), filler, block)
    block = torch.linalg.qr(block).Q
    block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
