"""Leading singular triplets of a stack of matrices, and the block Krylov spaces that give them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.scaling import UnitScaled, require_finite, unit_scaled

# The choice is based on measurements on 2026-11-21 (torch 2.13, 1 thread, k = 33, 768×768) with
# blocks of 8 to 41 and 2 to 16 rounds. 8 rounds take 15 ms per matrix, and σ_33 is exact to 3 % on
# noise and to 3e-4 on i^-0.2. Six rounds take 11 ms, with 8 % and 6e-3. torch.svd_lowrank with
# niter=2 takes 6 ms, with 9 % and 6 %.
DEFAULT_ROUNDS = 8
_BLOCK = 16
# The smallest number of dimensions of the Krylov space for each requested value.
_SPACE = 3
# Below this value, in units of σ₁, W v / σ is not a unit vector to float32's precision.
_NEARLY_ZERO = 1e-5
# The complete SVD of a 128×128 matrix takes 1.1 ms, and an iteration takes 1.2 ms.
_EXACT_UP_TO = 128
_SEED = 20260201
# The number of vectors that `RitzSpace.norm_after` returns as a start for a second iteration. With
# 4 rounds, 16 left an error of 0.5 % on noise, and 8 vectors 0.9 %.
_NUM_LARGEST = 16
# In units of ε and a column's norm. If less than this remains of the column, it is only rounding.
# With 10, a matrix of rank one left 10.8 on one CPU, and the bases were no longer orthonormal.
_ROUNDING = 100


@dataclass(frozen=True, slots=True)
class RitzSpace:
    """A Krylov space, and how the matrix leaves it: enough to know σ₁ after an edit.

    Let U, Σ and V be all Ritz triplets of the space, and C = UᵀW − ΣVᵀ their residuals. An edit of
    the leading values, with Σ* instead of Σ, leaves UᵀW* = Σ*Vᵀ + C, where CV = 0. So its norm is
    that of Σ*² + CCᵀ. It includes what unconverged vectors have left behind [ours].
    """

    basis: Tensor
    """(..., max(m, n), K), orthonormal, of the longer side of W."""
    rotation: Tensor
    """(..., K, K): all Ritz vectors of this side are ``basis @ rotation``."""
    sigma: Tensor
    """(..., K), all Ritz values, descending, in units of σ₁."""
    outside: Tensor
    """(..., K, K): CCᵀ in units of σ₁²."""

    def norm_after(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return σ₁ of the edited matrix from below, and the vectors of its largest values.

        Args:
            before: (..., k), the leading values, in any unit.
            after: (..., k), their new values in the same unit.

        Returns:
            σ₁, (...), and orthonormal vectors of the longer side of W, (..., max(m, n), 16).
        """
        unit = torch.where(before[..., :1] > 0, before[..., :1], 1.0)
        values = torch.cat([after / unit, self.sigma[..., after.shape[-1] :]], dim=-1)
        # A matrix that is not finite has NaN values, which LAPACK would refuse.
        gram = self.outside + torch.diag_embed(values.nan_to_num().square())
        squares, vectors = torch.linalg.eigh(gram)
        norm = squares[..., -1].clamp_min(0).sqrt() * unit.squeeze(-1)
        return norm, self.basis @ (self.rotation @ vectors[..., -_NUM_LARGEST:])


@dataclass(frozen=True, slots=True)
class Triplets:
    """Leading singular triplets W v_i ≈ σ_i u_i and Wᵀ u_i ≈ σ_i v_i with descending σ."""

    u: Tensor
    """(..., m, k), with orthonormal columns."""
    sigma: Tensor
    """(..., k), descending, in the units of the matrix."""
    v: Tensor
    """(..., n, k), with orthonormal columns."""
    space: RitzSpace | None
    """The space of an iteration. None if the triplets come from a complete decomposition."""

    @property
    def is_exact(self) -> bool:
        """Whether the triplets come from a complete decomposition."""
        return self.space is None


def leading_triplets(
    weight: Tensor,
    k: int,
    *,
    start: Tensor | None = None,
    num_rounds: int = DEFAULT_ROUNDS,
    check_finite: bool = True,
) -> Triplets:
    """Return the k leading singular triplets of each matrix.

    The method is Rayleigh–Ritz on a block Krylov space (Musco & Musco 2015, arXiv 1504.05477,
    algorithm 2); see `krylov_space`. Small matrices are decomposed exactly. Matrices are also
    decomposed exactly if the space would have at least three quarters of their dimensions.

    Values that have not converged are still consistent. No value is above the true one, U and V are
    orthonormal, and the equation of the longer side of W is exact: WV = UΣ for m >= n, WᵀU = VΣ for
    m < n. So an edit W − U(Σ − Σ*)Vᵀ with Σ* <= Σ is W times a contraction. It raises no singular
    value of W, and changes ‖W‖_F² by exactly Σ(σ*² − σ²).

    The measured errors of σ₁ and of σ_33 for k = 33, as a share of each, are: 1e-4 and
    0.03 for noise at 768×768, 1e-6 and 0.005 for noise at 256×256, and 1e-6 and 4e-4 for
    σ_i ∝ i^-0.2 at 768×768.

    Args:
        weight: (..., m, n), any real floating dtype. Computed in float32, or float64 for float64.
        k: The number of triplets. At most min(m, n) are returned.
        start: (..., n, b), guesses for v, such as those of an earlier step. The first k of them are
            used. Missing columns are filled deterministically, without the global random state.
        num_rounds: The number of multiplications by WᵀW. With 0, `start` is used unchanged.
        check_finite: Whether to raise on NaN and inf, which costs one device-to-host read. If
            false, such a matrix gives NaN values.

    Raises:
        NonFiniteError: A matrix holds NaN or inf, and check_finite is true.
        ConfigurationError: k < 1, a count is negative, or the start has the wrong shape.

    >>> leading_triplets(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2).sigma.tolist()
    [5.0, 3.0]
    """
    if k < 1 or num_rounds < 0:
        raise ConfigurationError(
            f"You gave k={k}, num_rounds={num_rounds}; give k >= 1 and num_rounds >= 0."
        )
    _check_start(weight, start)
    scaled = unit_scaled(weight)
    if check_finite:
        require_finite(scaled)
    found = triplets_of_scaled(scaled, k, start=start, num_rounds=num_rounds)
    return replace(found, sigma=scaled.restore(found.sigma))


def triplets_of_scaled(
    scaled: UnitScaled, k: int, *, start: Tensor | None = None, num_rounds: int = DEFAULT_ROUNDS
) -> Triplets:
    """Return `leading_triplets` of matrices that are already scaled, in their scaled units."""
    matrix, guess = scaled.matrix, None if start is None else start.to(scaled.matrix)
    wide = matrix.shape[-2] < matrix.shape[-1]
    if wide:
        guess = None if guess is None else matrix @ guess
        matrix = matrix.mT
    size = matrix.shape[-1]
    k = min(k, size)
    block = _block(matrix, guess, k, num_rounds)
    space = None
    if size <= _EXACT_UP_TO or 4 * block.shape[-1] * (num_rounds + 1) >= 3 * size:
        # Apple's GPUs have no float64.
        by_gram = matrix.dtype == torch.float32 and matrix.device.type != "mps"
        u, sigma, v = _exact_by_gram(matrix, k) if by_gram else _exact(matrix)
        u, sigma, v = u[..., :k], sigma[..., :k], v[..., :k]
    else:
        u, sigma, v, space = _rayleigh_ritz(matrix, block, num_rounds, k)
    if wide:
        u, v = v, u
    return Triplets(u=u, sigma=sigma, v=v, space=space)


def _check_start(weight: Tensor, start: Tensor | None) -> None:
    if start is None:
        return
    expected = (*weight.shape[:-2], weight.shape[-1])
    if start.ndim != weight.ndim or start.shape[:-1] != expected:
        raise ConfigurationError(
            f"You gave a start of shape {tuple(start.shape)} for matrices of shape "
            f"{tuple(weight.shape)}; give shape {(*expected, 'b')}: guesses for v, in columns."
        )


def _exact(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(tall, full_matrices=False)
    return u, sigma, vh.mT


def _exact_by_gram(tall: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading triplets of a float32 matrix, from eigenvectors of WᵀW in float64.

    Float64 resolves every value above 1e-8 σ₁, which is more than float32 entries determine. For
    64×64 this takes 0.4 ms, and the SVD takes 0.7 ms (2026-11-30, torch 2.13, one thread).
    """
    exact = tall.double()
    squares, v = torch.linalg.eigh(exact.mT @ exact)
    sigma = squares.flip(-1)[..., :k].clamp_min(0).sqrt()
    v = v.flip(-1)[..., :k]
    image = exact @ v
    if bool((sigma[..., -1] > _NEARLY_ZERO * sigma[..., 0]).all()):
        u = image / sigma.unsqueeze(-2)
    else:
        # QR completes U where σ is nearly zero. Otherwise it changes at most the sign of a column.
        u, core = torch.linalg.qr(image)
        u *= torch.where(core.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    return u.to(tall.dtype), sigma.to(tall.dtype), v.to(tall.dtype)


def _block(tall: Tensor, guess: Tensor | None, k: int, num_rounds: int) -> Tensor:
    width = max(_BLOCK, math.ceil(_SPACE * k / (num_rounds + 1)))
    if guess is None:
        return cold_start(tall, width)
    # A guess with NaN or inf must not spoil the result.
    guess = torch.nan_to_num(guess, nan=0.0, posinf=0.0, neginf=0.0)[..., :k]
    guess = torch.linalg.qr(guess).Q
    return torch.cat([guess, cold_start(tall, max(width, k))[..., guess.shape[-1] :]], dim=-1)


def _rayleigh_ritz(
    tall: Tensor, block: Tensor, num_rounds: int, k: int
) -> tuple[Tensor, Tensor, Tensor, RitzSpace]:
    left, core, right = krylov_space(tall, block, num_rounds)
    u, sigma, v = _exact(core)
    # Wᵀ maps all but the last block of U into the span of V.
    last = slice(-block.shape[-1], None)
    rest = product(tall.mT, left[..., last])
    rest = rest - right @ (right.mT @ rest)
    unit = torch.where(sigma[..., :1] > 0, sigma[..., :1], 1.0)
    of_last = u[..., last, :] / unit.unsqueeze(-1)
    outside = of_last.mT @ (rest.mT @ rest) @ of_last
    space = RitzSpace(left, u, sigma / unit, outside)
    return left @ u[..., :k], sigma[..., :k], right @ v[..., :k], space


def krylov_space(tall: Tensor, start: Tensor, num_rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bidiagonalise W by blocks, and keep each new block orthogonal to all previous ones.

    V is a basis of span{X, (WᵀW)X, …, (WᵀW)^q X}, and U is one of the span of WV. The core is UᵀWV,
    so WV = U·core. Its singular values are the Ritz values.

    This is block Golub–Kahan–Lanczos (Golub, Luk & Overton 1981, ACM TOMS 7(2)) with full
    re-orthogonalisation. W is multiplied once by each block of V. Wᵀ is multiplied once by each
    block of U except the last one.

    Args:
        tall: (..., m, n), float32 or float64, m >= n, of unit scale.
        start: (..., n, b): X.
        num_rounds: q. If the space becomes complete earlier, fewer rounds are made.

    Returns:
        U, (..., m, K), the core, (..., K, K), and V, (..., n, K). U and V have orthonormal columns.
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
    return u, u.mT @ image, v


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
    block = block - basis @ (basis.mT @ block)
    left = torch.linalg.qr(block, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    block = torch.where((left <= limit).unsqueeze(-2), filler, block)
    block = torch.linalg.qr(block).Q
    block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
