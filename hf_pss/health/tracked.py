"""σ₁, ‖W‖_F and the stable rank of every selected matrix, tracked from step to step.

The package has six ways to σ₁. Each serves a purpose of its own, so each keeps its accuracy:

- `spectral_norm` without ``num_rounds``: exact, by SVD. For bounds of attention logits and for
  `hf-pss health --exact`.
- `spectral_norm` and `quick_stable_rank` with `QUICK_ROUNDS`: σ₁ from below. On noise the stable
  rank is too high by at most 0.3 % up to a side of 64, and 4 % at 768×768. Computed from scratch at
  each reading. For detectors, `hf-pss health` and matrices that this tracker cannot scale.
- `leading_triplets`: from below, on noise of 768×768 within 1e-4. Computed from scratch every 50
  steps for the floor's record (`hf_pss.models.anchors`), by the call that smoothing makes, so an
  unchanged matrix gives the same bits.
- `quick_triplets`: from below, on noise of 64×64 by 2 % on average. Computed from scratch.
- `SpectrumTracker`, here: from below, by one round of subspace iteration a step. A value is stale
  above a residual of 0.02, which bounds its error by 1 %. For the health metrics of a run.
- `hf_pss.health.spectral_norms`: from below, by one round of power iteration a call, and by
  `leading_triplets` every 50 calls. A value is stale above a residual of 0.05. For the probes of
  sweeps, whose records hold its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.health.subspace_rounds import orthonormal_rows, ritz_round
from hf_pss.linalg import frobenius_norm, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import MatrixRef, matrix_refs, measure_each
from hf_pss.models.distributed import Backend, Part, Replicated
from hf_pss.models.selection import MatrixView

__all__ = ["SpectrumTracker", "TrackedSpectrum"]

# Vectors per matrix. The second follows the direction that may overtake the first. With two, the
# cache serves all but the first of a block's five uses.
_WIDTH = 2
# Elements of a block: 1 MiB of fp32, the L2 cache of one core.
_BLOCK_ELEMENTS = 2**18
# Rounds of the Krylov space of the first refresh, before its one ordinary round.
_COLD_ROUNDS = 16
# Extra rounds in a step for a matrix with a large residual. The limit is half the stale one,
# because the vectors of a changing matrix lag behind before the residual shows it [ours].
_EXTRA_ROUNDS, _EXTRA_ABOVE = 2, 0.01
# Rounds a step on devices with enough bandwidth.
_DEVICE_ROUNDS = 2
# By Weyl, a value of WᵀW lies within residual · σ² of σ², so a value of W within half that share.
_STALE_ABOVE = 0.02
_SEED = 20261121
# fp32 elements (64 MiB) in one batched call on an accelerator, and of the Krylov spaces that a cold
# start holds at a time.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class TrackedSpectrum:
    """The numbers of one matrix, in its units; all NaN if it holds NaN or inf."""

    sigma: float
    """σ₁ from below."""
    frobenius: float
    """‖W‖_F."""
    residual: float
    """‖WᵀWv − s²v‖ / s² of the tracked unit vector v, s = ‖Wv‖. Some singular value lies within
    half of that share. It is near 0 if a direction stands out. On noise, whose first values lie
    close together, it is far above the error of σ₁."""

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / σ₁², from above; 0 for the zero matrix, as in `hf_pss.linalg.stable_rank`."""
        if self.sigma == 0:
            return 0.0 if self.frobenius == 0 else math.nan
        return (self.frobenius / self.sigma) ** 2

    @property
    def is_stale(self) -> bool:
        """Whether the bound on σ₁'s error exceeds 1 %, or is NaN."""
        return not self.residual <= _STALE_ABOVE


@dataclass(slots=True)
class _Group:
    """Matrices whose vectors have one length, dtype and device; k = 2."""

    slots: tuple[MatrixRef, ...]
    vectors: Tensor
    """(N, k, c), orthonormal rows; c is the stored tensor's last dimension."""
    scale: Tensor
    """(N,), the last σ₁. Vectors are divided by it before a product, so that nothing overflows."""
    found: Tensor
    """(N, 3), float64: σ₁, ‖W‖_F, the residual; on the device. NaN before the first round."""

    def chunks(self, size: int) -> Iterator[_Group]:
        """Yield the group in parts of that many matrices, which share its memory."""
        for first in range(0, len(self.slots), size):
            at = slice(first, first + size)
            yield _Group(self.slots[at], self.vectors[at], self.scale[at], self.found[at])

    def some(self, at: Sequence[int], index: Tensor) -> _Group:
        """Return a copy of the group with these matrices alone."""
        kept = (x.index_select(0, index) for x in (self.vectors, self.scale, self.found))
        return _Group(tuple(self.slots[i] for i in at), *kept)

    def put_back_(self, some: _Group, index: Tensor) -> None:
        """Copy the results of a part back."""
        self.vectors = self.vectors.index_copy(0, index, some.vectors)
        self.scale = self.scale.index_copy(0, index, some.scale)
        self.found = self.found.index_copy(0, index, some.found)


class SpectrumTracker:
    """Follows σ₁ and ‖W‖_F of the selected matrices by one reading of the weights a step.

    Subspace iteration on SᵀS with two vectors and Rayleigh–Ritz (Golub & Van Loan, Matrix
    Computations, section 8.2.4), S the matrix as it is stored. For each block of rows that fits in
    the cache it computes u = S_b V, Y += S_bᵀu and f += ‖S_b‖², so main memory is read once. From
    the Ritz vector z it takes σ = ‖SᵀSz‖ / ‖Sz‖, below σ₁ and above ‖Sz‖.

    The first `refresh`, also after a resume, builds a block Krylov space of 16 rounds instead,
    because no checkpoint holds the vectors.

    Cost: light, for every step, without a read from the device until `read`. Under FSDP2 each rank
    multiplies its own rows, and one sum over ranks joins a round. Replicas each do all the work.
    So do the ranks of ZeRO, on the copy for the forward pass; stage 3 gathers it one parameter at a
    time, in every round.

    Args:
        views: The matrices to follow.
        backend: How parameters are stored.
        batched: Stack equal shapes for one batched call each, which is slower on a CPU. None does
            so on all devices but a CPU.
    """

    def __init__(
        self, views: Sequence[MatrixView], backend: Backend, *, batched: bool | None = None
    ) -> None:
        self._views = tuple(views)
        self._slots = matrix_refs(self._views)
        self._backend = backend
        self._batched = batched
        self._groups: list[_Group] = []
        self._unsettled: frozenset[str] = frozenset()

    @torch.no_grad()
    def refresh(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Update all numbers to the current weights; only a cold start reads from the device.

        Matrices with a residual above 1 % get up to two more rounds. On a CPU they get them at
        once. On other devices, and if parameters are sharded, those found by the last `read` do.
        All ranks must call it.
        """
        if not self._slots:
            return
        if not self._groups:
            groups = self._grouped(parameters)
            for group in groups:
                self._start_cold(group, parameters)
            # Only now, so that a cold start that raises is repeated.
            self._groups = groups
        for group in self._groups:
            for _ in range(1 if group.vectors.device.type == "cpu" else _DEVICE_ROUNDS):
                self._round(group, parameters)
            for _ in range(_EXTRA_ROUNDS):
                unsettled = self._unsettled_in(group)
                if not unsettled:
                    break
                index = _sent(unsettled, group.vectors.device)
                some = group.some(unsettled, index)
                self._round(some, parameters, is_first=False)
                group.put_back_(some, index)
        self._unsettled = frozenset()

    @torch.no_grad()
    def read(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, TrackedSpectrum]:
        """Return the numbers of the last `refresh` by name, with one device-to-host read.

        Squares of entries beyond 1e19 or below 1e-22 do not fit into fp32. Such matrices, and those
        that hold inf or only zeros, are measured apart, scaled, with one or two more reads. All
        ranks must call it.

        Args:
            parameters: As in `refresh`; only those few matrices are read.
        """
        if not self._groups:
            return {}
        device = self._groups[0].found.device
        every = torch.cat([group.found.flatten().to(device) for group in self._groups])
        host = self._backend.agree(every)
        names = [slot.name for group in self._groups for slot in group.slots]
        found = {
            name: TrackedSpectrum(*numbers)
            for name, *numbers in zip(names, host[::3], host[1::3], host[2::3], strict=True)
        }
        odd = {name for name, one in found.items() if not _is_plausible(one)}
        if odd:
            found |= self._measured_apart(odd, parameters)
        self._unsettled = frozenset(n for n, one in found.items() if one.residual > _EXTRA_ABOVE)
        return {slot.name: found[slot.name] for slot in self._slots}

    def measure(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, TrackedSpectrum]:
        """Refresh and read."""
        self.refresh(parameters)
        return self.read(parameters)

    @torch.no_grad()
    def directions(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return v₁ of each matrix by name, (n,), from the last `refresh`.

        It is on the device and has length 1; zeros for a zero matrix, NaN for one that is not
        finite. All ranks must call it.
        """
        found: dict[str, Tensor] = {}
        for group in self._groups:
            sigma = group.found[:, :1]
            # 0, 1 or NaN.
            known = torch.where(sigma.isnan(), sigma, (sigma > 0).double()).to(group.vectors.dtype)
            for slot, vector in zip(group.slots, group.vectors[:, 0] * known, strict=True):
                found[slot.name] = vector
                if not slot.view.transposed:
                    continue
                # Stored as inputs × outputs, so the vector is u₁; one product gives v₁.
                v = vector.new_zeros(slot.shape[1])
                parameter = parameters[slot.view.parameter_name]
                with self._backend.read_part(parameter) as part:
                    is_whole = len(part.tensor) == parameter.shape[0]
                    stored = _stored(slot, part, is_whole=is_whole)
                    if stored is not None:
                        # The rows of an expert are never divided among ranks.
                        start = 0 if slot.expert is not None else part.start
                        v[start : start + len(stored)] = stored.to(v.dtype) @ vector
                found[slot.name] = v
        turned = [slot for group in self._groups for slot in group.slots if slot.view.transposed]
        if turned:
            whole = torch.cat([found[slot.name] for slot in turned])
            self._backend.total_(whole)
            sizes = [slot.shape[1] for slot in turned]
            for slot, v in zip(turned, torch.split(whole, sizes), strict=True):
                found[slot.name] = torch.nn.functional.normalize(v, dim=0)
        return {slot.name: found[slot.name] for slot in self._slots if slot.name in found}

    # ---- inside ----

    def _grouped(self, parameters: Mapping[str, nn.Parameter]) -> list[_Group]:
        alike: dict[tuple[int, torch.dtype, torch.device], list[MatrixRef]] = {}
        for slot in self._slots:
            parameter = parameters[slot.view.parameter_name]
            size = slot.shape[0] if slot.view.transposed else slot.shape[1]
            key = (size, compute_dtype(parameter), parameter.device)
            alike.setdefault(key, []).append(slot)
        generator = torch.Generator().manual_seed(_SEED)
        groups = []
        for (size, dtype, device), slots in alike.items():
            drawn = torch.randn(size, min(_WIDTH, size), generator=generator, dtype=torch.float64)
            start = torch.linalg.qr(drawn).Q.mT.to(device, dtype)
            vectors = start.expand(len(slots), -1, -1).contiguous()
            nothing = torch.full((len(slots), 3), math.nan, dtype=torch.float64, device=device)
            groups.append(_Group(tuple(slots), vectors, vectors.new_ones(len(slots)), nothing))
        return groups

    def _unsettled_in(self, group: _Group) -> list[int]:
        """Return the matrices that need more rounds, by their residuals on a CPU, else by `read`.

        Replicas find the same matrices, and their rounds need no other rank.
        """
        waits = self._backend.is_shared and type(self._backend) is not Replicated
        if group.found.device.type != "cpu" or waits:
            return [i for i, slot in enumerate(group.slots) if slot.name in self._unsettled]
        # More rounds do not help a residual of NaN.
        return [i for i, off in enumerate(group.found[:, 2].tolist()) if off > _EXTRA_ABOVE]

    def _round(
        self,
        group: _Group,
        parameters: Mapping[str, nn.Parameter],
        *,
        is_first: bool = True,
    ) -> None:
        """Do one round. The first of a refresh measures ‖W‖_F, too."""
        images, squares = self._products(group, group.vectors, parameters, squares=is_first)
        moved, found = ritz_round(group.vectors, images, squares)
        found[:, :2] *= group.scale.double().unsqueeze(-1)
        if not is_first:
            found[:, 1] = group.found[:, 1]
        group.vectors, group.found = moved, found
        group.scale = _usable(found[:, 0], group.scale)

    def _start_cold(self, group: _Group, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the two leading Ritz vectors of a block Krylov space of SᵀS into the group.

        Musco & Musco 2015, arXiv 1504.05477, algorithm 2, on the Gram matrix, which has the first
        values and loses those below 3e-4 σ₁. Decompositions read LAPACK's status from the device.
        """
        num_rows = 2 * (_COLD_ROUNDS + 1) * group.vectors.shape[1]  # of the basis and its images
        size = max(1, _MAX_ELEMENTS // (num_rows * group.vectors.shape[2]))
        chunks = list(group.chunks(size))
        for chunk in chunks:
            self._start_chunk_cold(chunk, parameters)
        group.vectors = torch.cat([chunk.vectors for chunk in chunks])
        group.scale = torch.cat([chunk.scale for chunk in chunks])

    def _start_chunk_cold(self, group: _Group, parameters: Mapping[str, nn.Parameter]) -> None:
        _, squares = self._products(group, group.vectors, parameters)
        group.scale = _usable(squares.sqrt(), torch.ones_like(group.scale))
        basis = group.vectors
        generator = torch.Generator().manual_seed(_SEED + 1)
        images: list[Tensor] = []
        block = basis
        num_rounds = min(_COLD_ROUNDS, basis.shape[-1] // basis.shape[-2] - 1)
        for i in range(num_rounds + 1):
            image, _ = self._products(group, block, parameters)
            is_finite = image.isfinite().all(dim=-1).all(dim=-1)
            image = torch.where(is_finite[:, None, None], image, 0.0)
            images.append(image)
            if i == num_rounds:
                break
            filler = torch.randn(image.shape[1:], generator=generator, dtype=torch.float64)
            block = orthonormal_rows(image, basis, filler.to(image.device, image.dtype))
            basis = torch.cat([basis, block], dim=1)
        core = basis @ torch.cat(images, dim=1).mT
        _, rotation = torch.linalg.eigh((core + core.mT).double() / 2)
        leading = rotation[..., -basis.shape[1] :].flip(-1)[..., : group.vectors.shape[1]]
        vectors = leading.to(basis.dtype).mT @ basis
        # The round that follows multiplies these vectors again, so its value is below σ₁.
        group.vectors = torch.linalg.qr(vectors.mT).Q.mT.contiguous()

    def _products(
        self,
        group: _Group,
        vectors: Tensor,
        parameters: Mapping[str, nn.Parameter],
        *,
        squares: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return SᵀSv / scale² of all vectors, (N, k, c), and ‖S‖_F² / scale², (N,).

        Without `squares` ones take the place of the latter.
        """
        inverse = group.scale.reciprocal()
        scaled = vectors * inverse[:, None, None]
        images = torch.zeros_like(vectors)
        norms = [vectors.new_zeros(())] * len(group.slots)
        batch: dict[tuple[int, torch.dtype], list[tuple[int, Tensor]]] = {}
        is_batched = vectors.device.type != "cpu" if self._batched is None else self._batched
        # A product with a vector keeps one core busy, so each core takes matrices of its own.
        tasks: dict[int, Future[Tensor]] = {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i, slot in enumerate(group.slots):
                parameter = parameters[slot.view.parameter_name]
                with self._backend.read_part(parameter) as part:
                    stored = _stored(slot, part, is_whole=len(part.tensor) == parameter.shape[0])
                    if stored is None:
                        continue
                    if is_batched:
                        key = (len(stored), stored.dtype)
                        batch.setdefault(key, []).append((i, stored))
                        continue
                    tasks[i] = pool.submit(
                        _add_blockwise_, images[i], stored, scaled[i], norm=squares
                    )
                    if self._backend.is_shared:  # the tensor may exist for this look only
                        tasks[i].result()
        for i, task in tasks.items():
            norms[i] = task.result()
        for members in batch.values():
            _add_batched_(images, norms, members, scaled)
        images *= inverse[:, None, None]
        found = (torch.stack(norms) * inverse).square()
        if self._backend.is_shared:
            whole = torch.cat([images.flatten(), found])
            self._backend.total_(whole)
            images, found = whole[: images.numel()].view_as(images), whole[images.numel() :]
        return images, found if squares else torch.ones_like(found)

    def _measured_apart(
        self, names: Collection[str], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, TrackedSpectrum]:
        """Measure matrices that overflow or vanish, whose vectors and residuals have no meaning.

        Collective, like `measure_each`; every rank has the same names.
        """

        def measured(
            names: Collection[str], measure: Callable[[Tensor], Tensor]
        ) -> dict[str, float]:
            held = {slot.view.name for slot in self._slots if slot.name in names}
            views = [view for view in self._views if view.name in held]
            return measure_each(views, parameters, self._backend, measure)

        norms = measured(names, frobenius_norm)
        # A zero matrix needs no σ₁.
        sigmas = {name: norms[name] for name in names} | measured(
            [name for name in names if norms[name] > 0],
            lambda stack: spectral_norm(stack, num_rounds=QUICK_ROUNDS),
        )
        for group in self._groups:
            known = [sigmas.get(slot.name, 0.0) for slot in group.slots]
            group.scale = _usable(group.found.new_tensor(known), group.scale)
        return {
            name: TrackedSpectrum(sigmas[name], norms[name], 0.0 if norms[name] == 0 else math.nan)
            for name in names
        }


def _stored(slot: MatrixRef, part: Part, *, is_whole: bool) -> Tensor | None:
    """Return this rank's rows of a matrix as stored, (rows, c), sharing memory if possible."""
    if not is_whole:
        piece = slot.view.piece(part.tensor, part.start, slot.expert)
        if piece is None:
            return None
        found = piece.read()
    else:
        own = part.tensor if slot.expert is None else part.tensor[slot.expert]
        found = slot.matrix_view.read(own)
    return found.mT if slot.view.transposed else found


@torch.no_grad()  # which a thread begins without
def _add_blockwise_(images: Tensor, stored: Tensor, vectors: Tensor, *, norm: bool) -> Tensor:
    """Add SᵀSv to each of the images, a block of S at a time; return ‖S‖_F, or 0."""
    found = [images.new_zeros(())]
    for part in torch.split(stored, max(1, _BLOCK_ELEMENTS // stored.shape[-1])):
        block = part.to(images.dtype)
        for image, vector in zip(images, vectors, strict=True):
            # On a CPU products with a narrow matrix are far slower than those with vectors.
            image.addmv_(block.mT, torch.mv(block, vector))
        # One norm of all is slow for rows that lie apart, and one a row for adjacent rows.
        if norm and block.is_contiguous():
            found.append(torch.linalg.vector_norm(block))
        elif norm:
            found.append(torch.linalg.vector_norm(torch.linalg.vector_norm(block, dim=-1)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(found))
    return total


def _add_batched_(
    images: Tensor,
    norms: list[Tensor],
    members: Sequence[tuple[int, Tensor]],
    vectors: Tensor,
) -> None:
    """Do the same as `_add_blockwise_` for matrices of one shape, at most 64 MiB at a time."""
    size = max(1, _MAX_ELEMENTS // members[0][1].numel())
    for first in range(0, len(members), size):
        chunk = members[first : first + size]
        index = _sent([i for i, _ in chunk], images.device)
        stack = torch.stack([stored for _, stored in chunk]).to(images.dtype)
        own = vectors[index]
        images[index] = (own @ stack.mT) @ stack
        for (i, _), norm in zip(chunk, torch.linalg.vector_norm(stack, dim=(1, 2)), strict=True):
            norms[i] = norm


def _usable(scale: Tensor, otherwise: Tensor) -> Tensor:
    """Return these scales where they and their inverses are normal numbers, else the others."""
    scale, tiny = scale.to(otherwise.dtype), torch.finfo(otherwise.dtype).tiny
    return torch.where((scale >= tiny) & (scale <= 1 / tiny), scale, otherwise)


def _sent(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    """Copy host numbers to a device without waiting for it."""
    here = torch.tensor(values)
    if device.type == "cuda":  # a copy from pageable memory would wait
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


def _is_plausible(one: TrackedSpectrum) -> bool:
    """Return whether no square has overflown or vanished: ‖W‖_F is at least σ₁, neither is 0.

    A sum of squares is NaN only if an entry is. Such a matrix has no other numbers.
    """
    if math.isnan(one.frobenius):
        return True
    return math.isfinite(one.residual) and 0 < one.sigma <= one.frobenius * (1 + 1e-3)
