"""Metrics of updates: the share of each matrix that changes, and the gap between recent ones."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import (
    MatrixRef,
    Stack,
    assign_rounds,
    by_parameter,
    matrix_refs,
    raise_together,
    read_round,
)
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.selection import MatrixView


class RelativeUpdateMeter:
    """Measures ‖W_t − W_{t−1}‖_F / ‖W_{t−1}‖_F of each 2-D matrix in one update.

    This is the inverse of the trust ratio of LARS and LAMB (arXiv 1708.03888, 1904.00962). Here it
    is computed from the update itself, including weight decay. It is the share of the matrix that
    changes per step, without unit. It is 0 if nothing has changed, inf if a zero matrix has
    changed, and NaN if a matrix holds NaN or inf.

    Cost: standard. It needs the memory of one copy and of one parameter's difference, three passes
    over the copy at measured steps, and one device-to-host read. If parameters are sharded, every
    rank measures the rows that it stores. Do not use it with a backend that cannot hold an update
    back, because both calls would then come after the update.

    Args:
        views: The matrices to read.
        backend: How parameters are stored.
    """

    def __init__(self, views: Sequence[MatrixView], backend: Backend) -> None:
        self._views = tuple(views)
        self._backend = backend
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the matrices before the update."""
        self._before = {}
        for name in {view.parameter_name: None for view in self._views}:
            with self._backend.part(parameters[name]) as part:
                self._before[name] = part.tensor.clone()

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Return ‖ΔW‖_F/‖W‖_F of each 2-D matrix by name since `start`, and drop the copy.

        For types narrower than float64 the squares are summed in float32. So entries beyond 1e19
        give inf, and entries below 1e-22 give zero. Without a `start` the result is empty.
        """
        before, self._before = self._before, {}
        if not before:
            return {}
        device = next(iter(before.values())).device
        refs = matrix_refs(self._views)
        rows: list[Tensor] = []
        for name, group in by_parameter(refs):
            with self._backend.part(parameters[name]) as part:
                # The copy of a parameter is freed as soon as the parameter has been measured.
                rows += [pair.to(device) for pair in _squares(group, before.pop(name), part)]
        squares = torch.stack(rows)
        self._backend.total_(squares)
        changes, norms = squares.sqrt().unbind(dim=1)
        ratios = torch.where((changes == 0) & (norms == 0), 0.0, changes / norms)
        return dict(zip([ref.name for ref in refs], self._backend.agree(ratios), strict=True))


def _squares(refs: Sequence[MatrixRef], old: Tensor, part: Part) -> list[Tensor]:
    """Return ‖ΔW‖_F² and ‖W‖_F² of this rank's rows of each matrix, (2,), float64."""
    dtype = compute_dtype(old)
    moved = part.tensor.to(dtype) - old.to(dtype)
    return [torch.stack([_square(ref, x, part.start) for x in (moved, old)]) for ref in refs]


def _square(ref: MatrixRef, stored: Tensor, start: int) -> Tensor:
    """Return ‖·‖_F² of this rank's rows of a matrix, float64."""
    piece = ref.view.piece(stored, start, ref.expert)
    if piece is None:
        return stored.new_zeros((), dtype=torch.float64)
    # If all of this were in float64, torch would copy the complete matrix on a CPU.
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(stored))
    return norm.double().square()


@dataclass(frozen=True, slots=True)
class SpectralEdge:
    """The largest gap in the spectrum of a window of updates (arXiv 2603.28964)."""

    sigmas: tuple[float, ...]
    """The singular values of the W×P matrix of updates, descending, in the units of the weights.
    They are NaN if an update is not finite."""
    position: int
    """k*, the number of dominant modes: the j in [1, W − 1] with the largest σ_j/σ_{j+1}.
    It is 0 without a gap."""
    ratio: float
    """σ_k*/σ_{k*+1}, without unit. It is inf if all later values are
    rounding, NaN without a gap."""


def spectral_edge(updates: Tensor) -> SpectralEdge:
    """Return the gap of the Gram matrix UUᵀ of a window of updates.

    k* = argmax_j σ_j/σ_{j+1} comes from arXiv 2603.28964. In that paper the gap collapses before
    reorganisations such as grokking. The gap alone is a weak alarm. We count values below W·ε·σ₁ as
    zero. The function reads from the device.

    Args:
        updates: (W, P), one update or its projection in each row, any real floating dtype, W >= 2.
            The decomposition is done in float64.

    >>> spectral_edge(torch.diag(torch.tensor([8.0, 4.0, 1.0]))).position
    2
    """
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
    """Tracks the gap over the last W updates of all selected matrices together.

    Each matrix is projected to AWB/√(pq), where A (p×m) and B (n×q) are fixed blocks of random
    signs. The projection preserves inner products on average (two-sided Johnson–Lindenstrauss).
    Each matrix has separate blocks, so the errors of many matrices average out. docs/health.md has
    the measured error of the ratio. Since the projection is linear, an update is a difference of
    projected weights, and no copy of the weights is kept. The rounding is that of the weights,
    about 1e-7 of ‖W‖ in fp32.

    An update is the change between two calls. The window is not saved in checkpoints, so it is
    empty after a resume.

    Cost: standard. Each call makes one product of each matrix with a narrow block, and one
    device-to-host read. The memory per matrix is (m + n)·16 numbers for the blocks, and W·256
    numbers on the host.

    Args:
        views: The matrices to read.
        backend: How parameters are stored.
        window_size: W, the number of updates, at least 2.
        width: p and q, the numbers of rows of A and columns of B.
    """

    def __init__(
        self,
        views: Sequence[MatrixView],
        backend: Backend,
        *,
        window_size: int = 10,
        width: int = 16,
    ) -> None:
        self._views, self._backend, self._width = tuple(views), backend, width
        self._place = {slot.name: i for i, slot in enumerate(matrix_refs(self._views))}
        self._blocks: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._last: Tensor | None = None
        self._updates: deque[Tensor] = deque(maxlen=window_size)

    @torch.no_grad()
    def measure(self, parameters: Mapping[str, nn.Parameter]) -> SpectralEdge | None:
        """Add the current weights to the window. Return the gap, or None while it is not full."""
        if not self._place:
            return None
        now = self._projected(parameters)
        if self._last is not None:
            self._updates.append(now - self._last)
        self._last = now
        if len(self._updates) != self._updates.maxlen:
            return None
        # The projections come from fp32 weights, so the precision of float32 decides
        # which values are rounding.
        return spectral_edge(torch.stack(list(self._updates)).float())

    def _projected(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the projections of all matrices in one row, (P,), float64, on the host."""
        device = next(iter(parameters.values())).device
        shape = len(self._place), self._width**2
        found = torch.zeros(shape, dtype=torch.float64, device=device)
        error: Exception | None = None
        for turn in assign_rounds(self._views, parameters, self._backend.world_size):
            stack = read_round(turn, parameters, self._backend)
            if stack is None:
                continue
            try:
                seen = self._project(stack)
            except Exception as caught:  # the other ranks wait for this one in later turns
                error = caught
                continue
            found[[self._place[name] for name in stack.names]] = seen.flatten(-2).to(found)
        flag = found.new_tensor([float(error is not None)])
        *every, has_failed = self._backend.sum_to_host(torch.cat([found.flatten(), flag]))
        if has_failed:
            raise_together(error)
        return torch.tensor(every, dtype=torch.float64)

    def _project(self, stack: Stack) -> Tensor:
        matrices = stack.matrices.to(compute_dtype(stack.matrices))
        if stack.names not in self._blocks:
            m, n = matrices.shape[-2:]
            left = [_signs(name + " left", self._width, m) for name in stack.names]
            right = [_signs(name + " right", n, self._width) for name in stack.names]
            sides = torch.stack(left).to(matrices) / self._width, torch.stack(right).to(matrices)
            self._blocks[stack.names] = sides
        a, b = self._blocks[stack.names]
        return a @ (matrices @ b)


def _gap(larger: float, smaller: float, floor: float) -> float:
    if larger <= floor:
        return 0.0
    return larger / smaller if smaller > floor else math.inf


def _signs(name: str, m: int, n: int) -> Tensor:
    """Return the signs ±1 for a name. They are the same at every call and on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 2, (m, n), generator=generator, dtype=torch.int8) * 2 - 1
