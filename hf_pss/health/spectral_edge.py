"""The gap in the spectrum of the last few updates, on random projections."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.models.batching import MatrixRef, assign_rounds, matrix_refs, raise_together, read_round
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = ["SpectralEdge", "SpectralEdgeMeter", "spectral_edge"]


@dataclass(frozen=True, slots=True)
class SpectralEdge:
    """The largest gap in the spectrum of a window of updates (arXiv 2603.28964)."""

    sigmas: tuple[float, ...]
    """Of the W×P matrix of updates, descending: roots of the Gram matrix's eigenvalues, in the
    units of the weights. NaN where an update is not finite."""
    position: int
    """k*, the j in [1, W − 1] with the largest σ_j/σ_{j+1}: how many modes are dominant; 0 where
    there is none."""
    ratio: float
    """σ_k*/σ_{k*+1}, without unit; inf where all else is rounding, NaN where there is none."""


def spectral_edge(updates: Tensor) -> SpectralEdge:
    """Return the gap of the Gram matrix UUᵀ of a window of updates.

    k* = argmax_j σ_j/σ_{j+1} is of arXiv 2603.28964, where the gap's collapse comes before
    reorganisations such as grokking; a weak alarm by itself. Taking values below W·ε·σ₁ for zero
    is ours. Reads from the device.

    Args:
        updates: (W, P), an update or its projection a row, any real floating dtype, W >= 2; the
            decomposition is in float64.

    Raises:
        ConfigurationError: Fewer than two updates.

    >>> spectral_edge(torch.diag(torch.tensor([8.0, 4.0, 1.0]))).position
    2
    """
    if updates.ndim != 2 or len(updates) < 2:
        raise ConfigurationError(
            f"You gave updates of shape {tuple(updates.shape)}; give (W, P) with W >= 2."
        )
    epsilon = torch.finfo(updates.dtype).eps
    wide = updates.detach().to("cpu", torch.float64)
    if not bool(wide.isfinite().all()):
        return SpectralEdge((math.nan,) * len(wide), 0, math.nan)
    sigmas = torch.linalg.svdvals(wide).tolist()
    sigmas += [0.0] * (len(wide) - len(sigmas))
    floor = len(sigmas) * epsilon * sigmas[0]
    ratios = [_gap(a, b, floor) for a, b in itertools.pairwise(sigmas)]
    position = max(range(len(ratios)), key=ratios.__getitem__)
    if ratios[position] == 0:
        return SpectralEdge(tuple(sigmas), 0, math.nan)
    return SpectralEdge(tuple(sigmas), position + 1, ratios[position])


class SpectralEdgeMeter:
    """Follows the gap over the last W updates of all selected matrices together.

    Each matrix is seen as AWB/√(pq) with fixed blocks of random signs A (p×m) and B (n×q), which
    keeps inner products in the mean (two-sided Johnson–Lindenstrauss; blocks are drawn anew for
    each matrix, so errors of many matrices average out); the docs have the measured error of the
    ratio. Since the projection is linear, updates are differences of projected weights: no copy of
    the weights is kept. Their rounding is that of the weights', about 1e-7 of ‖W‖ in fp32.

    Cost: standard. One product of each matrix with a narrow block and one device-to-host read a
    call; memory, the blocks, (m + n)·16 numbers a matrix, and W·256 numbers a matrix on the host.
    An update is whatever lies between two calls. The window is not part of any checkpoint: after a
    resume it fills anew.

    Args:
        views: What to read.
        backend: How parameters are stored.
        window_size: W, updates, at least 2.
        width: p and q, columns and rows of the blocks, at least 1.

    Raises:
        ConfigurationError: A number outside of its range.
    """

    def __init__(
        self,
        views: Sequence[MatrixView],
        backend: Backend,
        *,
        window_size: int = 10,
        width: int = 16,
    ) -> None:
        if window_size < 2 or width < 1:
            raise ConfigurationError(
                f"You gave window_size={window_size}, width={width}; give at least 2 and 1."
            )
        self._views = tuple(views)
        self._backend = backend
        self._width = width
        self._place = {slot.name: i for i, slot in enumerate(matrix_refs(self._views))}
        self._blocks: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._last: Tensor | None = None
        self._updates: deque[Tensor] = deque(maxlen=window_size)

    @torch.no_grad()
    def measure(self, parameters: Mapping[str, nn.Parameter]) -> SpectralEdge | None:
        """Take the weights as they are now; return the gap, None until the window is full."""
        if not self._place:
            return None
        now = self._projected(parameters)
        if self._last is not None:
            self._updates.append(now - self._last)
        self._last = now
        if len(self._updates) < (self._updates.maxlen or 0):
            return None
        # Projections are of fp32 weights, whatever holds them here.
        return spectral_edge(torch.stack(list(self._updates)).float())

    def _projected(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return every matrix's projection, one behind the other, (P,) float64 on the host."""
        rows = self._width**2
        told: Tensor | None = None
        error: Exception | None = None
        for turn in assign_rounds(self._views, parameters, self._backend.world_size):
            stack = read_round(turn, parameters, self._backend)
            if stack is None:
                continue
            if told is None:
                told = stack.matrices.new_zeros(len(self._place), rows, dtype=torch.float64)
            at = [self._place[name] for name in stack.names]
            try:
                seen = self._project(stack.refs, stack.matrices)
            except Exception as caught:  # the others wait for this rank in the turns to come
                error = caught
                continue
            told[torch.tensor(at, device=told.device)] = seen.flatten(-2).to(told)
        if told is None:  # this rank owns nothing, and still has to listen
            device = next(iter(parameters.values())).device
            told = torch.zeros(len(self._place), rows, dtype=torch.float64, device=device)
        flag = told.new_tensor([float(error is not None)])
        *every, has_failed = self._backend.sum_to_host(torch.cat([told.flatten(), flag]))
        if has_failed:
            raise_together(error)
        return torch.tensor(every, dtype=torch.float64)

    def _project(self, slots: Sequence[MatrixRef], matrices: Tensor) -> Tensor:
        names = tuple(slot.name for slot in slots)
        dtype = torch.float64 if matrices.dtype == torch.float64 else torch.float32
        if names not in self._blocks:
            m, n = matrices.shape[-2:]
            both = [
                (_signs(name + " left", self._width, m), _signs(name + " right", n, self._width))
                for name in names
            ]
            left, right = (torch.stack(list(blocks)) for blocks in zip(*both, strict=True))
            device = matrices.device
            self._blocks[names] = left.to(device, dtype) / self._width, right.to(device, dtype)
        left, right = self._blocks[names]
        return left @ (matrices.to(dtype) @ right)


def _gap(larger: float, smaller: float, floor: float) -> float:
    if larger <= floor:
        return 0.0
    return larger / smaller if smaller > floor else math.inf


def _signs(name: str, m: int, n: int) -> Tensor:
    """Return the same ±1 for a name at every call and on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 2, (m, n), generator=generator, dtype=torch.int8) * 2 - 1
