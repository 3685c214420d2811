"""σ₁, ‖W‖_F and the stable rank of every selected matrix at each step: followed, not recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_pss.linalg import frobenius_norm, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import MatrixRef, matrix_refs, measure_each
from hf_pss.models.distributed import Backend, Part, Replicated
from hf_pss.models.selection import MatrixView

__all__ = ["SpectrumTracker", "TrackedSpectrum", "ritz_round"]

# Vectors that are followed: the second is what may overtake the first. With two, a block of a
# matrix is read from the cache for all but the first of its five uses.
_WIDTH = 2
# Elements of a block: 1 MiB of fp32, the L2 cache of one core, shared by as many as there are.
_BLOCK_ELEMENTS = 2**18
# Rounds of the Krylov space that the first refresh builds, and after which it is refreshed once.
_COLD_ROUNDS = 16
# More of them in a step for a matrix whose residual asks for it: half of what makes it stale, since
# the vectors of a matrix on the move lag behind before the residual says so [ours].
_EXTRA_ROUNDS, _EXTRA_ABOVE = 2, 0.01
# Where bandwidth is no matter.
_DEVICE_ROUNDS = 2
# Weyl: a value of WᵀW lies within residual · σ² of σ², so one of W within half of that.
_STALE_ABOVE = 0.02
_SEED = 20261121
# In units of ‖W‖_F², and of a row's length: far above the rounding of fp32.
_LOST = 1e-5
# fp32 elements in one batched call on a device that is no CPU, and of the spaces that a cold start
# has at one time (64 MiB).
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class TrackedSpectrum:
    """What is known of one matrix, in its units; all NaN where it holds NaN or inf."""

    sigma: float
    """σ₁ from below."""
    frobenius: float
    """‖W‖_F."""
    residual: float
    """‖WᵀWv − s²v‖ / s² of the unit vector that was followed, s = ‖Wv‖: some singular value lies
    within half of that share. Near 0 where a direction stands out; on noise, where the first
    values lie close together, it is far above the error of σ₁."""

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
    """Matrices whose vectors are of one length, dtype and device; k = 2."""

    slots: tuple[MatrixRef, ...]
    vectors: Tensor
    """(N, k, c), orthonormal rows: of the stored tensor's last dimension."""
    scale: Tensor
    """(N,), the last σ₁: products are taken of vectors divided by it, so that nothing overflows."""
    found: Tensor
    """(N, 3), float64: σ₁, ‖W‖_F, the residual; on the device. NaN before the first round."""

    def chunks(self, size: int) -> Iterator[_Group]:
        """Yield the group in groups of that many matrices, which share its memory."""
        for first in range(0, len(self.slots), size):
            at = slice(first, first + size)
            yield _Group(self.slots[at], self.vectors[at], self.scale[at], self.found[at])

    def some(self, at: Sequence[int], index: Tensor) -> _Group:
        """Return a copy of the group with these matrices alone."""
        kept = (x.index_select(0, index) for x in (self.vectors, self.scale, self.found))
        return _Group(tuple(self.slots[i] for i in at), *kept)

    def put_back_(self, some: _Group, index: Tensor) -> None:
        """Take over what `some` has become."""
        self.vectors = self.vectors.index_copy(0, index, some.vectors)
        self.scale = self.scale.index_copy(0, index, some.scale)
        self.found = self.found.index_copy(0, index, some.found)


class SpectrumTracker:
    """Follows σ₁ and ‖W‖_F of the selected matrices by one reading of the weights a step.

    Subspace iteration on SᵀS with two vectors and Rayleigh–Ritz (Golub & Van Loan, Matrix
    Computations, section 8.2.4), S the matrix as it is stored: for each block of rows that fits in
    the cache u = S_b V, Y += S_bᵀu and f += ‖S_b‖², so that main memory is read once. Of the Ritz
    vector z the estimate is σ = ‖SᵀSz‖ / ‖Sz‖, below σ₁ and above ‖Sz‖.

    Cost: light, for every step; nothing is read back until `read`. The first `refresh`, also the
    first after a resume, since vectors are in no checkpoint, builds a block Krylov space of 16
    rounds instead. Under FSDP2 each rank multiplies its own rows, and one sum over ranks a round
    joins them; replicas each do the whole, and so do the ranks of ZeRO, on the copy for the
    forward, which stage 3 gathers for it, one parameter at a time, in every round.

    Args:
        views: What to follow.
        backend: How parameters are stored.
        batched: Stack equal shapes for one batched call each, which a CPU is slower with; None: on
            all devices but a CPU.
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
        """Bring all numbers up to the weights as they are now; no device-to-host read but the cold.

        Matrices with a residual above 1 % get up to two rounds more: on a CPU at once, elsewhere,
        and where parameters are sharded, those that the last `read` found. All ranks must call.
        """
        if not self._slots:
            return
        if not self._groups:
            groups = self._grouped(parameters)
            for group in groups:
                self._start_cold(group, parameters)
            # Not before: a cold start that raises is to be made again, not gone on from.
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
        """Return what the last `refresh` found by the matrix's name; one device-to-host read.

        Numbers that fp32 squares cannot hold (entries beyond 1e19 or below 1e-22), and matrices
        that hold inf or nothing but zeros, are measured apart, scaled, with one or two reads more.
        All ranks must call.

        Args:
            parameters: As in `refresh`; they are looked at for those few only.
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
        """Return v₁ of each matrix by name, (n,), as it was followed to the last `refresh`.

        On the device, of length 1; zeros where the matrix maps it to nothing, NaN where it is
        broken. All ranks must call.
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
                # Stored as inputs × outputs: what is followed is u₁, one product away.
                v = vector.new_zeros(slot.shape[1])
                parameter = parameters[slot.view.parameter_name]
                with self._backend.read_part(parameter) as part:
                    is_whole = len(part.tensor) == parameter.shape[0]
                    stored = _stored(slot, part, is_whole=is_whole)
                    if stored is not None:
                        # Rows of an expert are never divided, those of a matrix from `start` on.
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
        """Return which matrices need more rounds: found out now on a CPU, by the last read else.

        Replicas find the same, and a round of theirs waits for nobody.
        """
        waits = self._backend.is_shared and type(self._backend) is not Replicated
        if group.found.device.type != "cpu" or waits:
            return [i for i, slot in enumerate(group.slots) if slot.name in self._unsettled]
        # NaN is nothing that rounds could mend.
        return [i for i, off in enumerate(group.found[:, 2].tolist()) if off > _EXTRA_ABOVE]

    def _round(
        self,
        group: _Group,
        parameters: Mapping[str, nn.Parameter],
        *,
        is_first: bool = True,
    ) -> None:
        """Do one round; ‖W‖_F is measured in the first of a refresh."""
        images, squares = self._products(group, group.vectors, parameters, squares=is_first)
        moved, found = ritz_round(group.vectors, images, squares)
        found[:, :2] *= group.scale.double().unsqueeze(-1)
        if not is_first:
            found[:, 1] = group.found[:, 1]
        group.vectors, group.found = moved, found
        group.scale = _usable(found[:, 0], group.scale)

    def _start_cold(self, group: _Group, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the two leading Ritz vectors of a block Krylov space of SᵀS into the group.

        Musco & Musco 2015, arXiv 1504.05477, algorithm 2, on the Gram matrix: good for the first
        values, and lost below 3e-4 σ₁. Decompositions read LAPACK's verdict back from a device.
        """
        num_rows = 2 * (_COLD_ROUNDS + 1) * group.vectors.shape[1]  # of the basis, and its images
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
        images: Tensor | None = None
        block = basis
        num_rounds = min(_COLD_ROUNDS, basis.shape[-1] // basis.shape[-2] - 1)
        for _ in range(num_rounds + 1):
            image, _ = self._products(group, block, parameters)
            is_finite = image.isfinite().all(dim=-1).all(dim=-1)
            image = torch.where(is_finite[:, None, None], image, 0.0)
            images = image if images is None else torch.cat([images, image], dim=1)
            if images.shape[1] > num_rounds * block.shape[1]:
                break
            filler = torch.randn(image.shape[1:], generator=generator, dtype=torch.float64)
            block = _orthonormal(image, basis, filler.to(image.device, image.dtype))
            basis = torch.cat([basis, block], dim=1)
        assert images is not None
        core = basis @ images.mT
        _, rotation = torch.linalg.eigh((core + core.mT).double() / 2)
        leading = rotation[..., -basis.shape[1] :].flip(-1)[..., : group.vectors.shape[1]]
        vectors = leading.to(basis.dtype).mT @ basis
        # The round that follows multiplies these vectors afresh: below σ₁ whatever they are.
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
        # A product with a vector keeps one core busy: each takes matrices of its own.
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
                    if self._backend.is_shared:  # it may have been put together for this look
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
        """Measure matrices that overflow or vanish; their vectors are of no use, so are residuals.

        Collective, like `measure_each`; every rank has been told the same names.
        """

        def measured(
            names: Collection[str], measure: Callable[[Tensor], Tensor]
        ) -> dict[str, float]:
            held = {slot.view.name for slot in self._slots if slot.name in names}
            views = [view for view in self._views if view.name in held]
            return measure_each(views, parameters, self._backend, measure)

        norms = measured(names, frobenius_norm)
        # A matrix of zeros has told all.
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


def ritz_round(vectors: Tensor, images: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Do one round of subspace iteration on WᵀW, given its products with the vectors.

    Args:
        vectors: (N, k, c), orthonormal rows, k at most 2, float32 or float64: V.
        images: (N, k, c): WᵀWV.
        squares: (N,): ‖W‖_F².

    Returns:
        The new vectors, an orthonormal basis of WᵀWV, the old ones where that is not finite or
        zero; and (N, 3) in float64: ‖WᵀWz‖/‖Wz‖ of the Ritz vector z, ‖W‖_F and the residual. NaN
        where something is not finite, but the norm: that is √squares whatever they are, inf where
        they have overflown. A residual of 1 where z is mapped to zero by a matrix that is not.

    >>> w = torch.diag(torch.tensor([2.0, 1.0]))
    >>> v = torch.eye(2)[None]
    >>> ritz_round(v, v @ w.mT @ w, torch.tensor([5.0]))[1].tolist()
    [[2.0, 2.23606797749979, 0.0]]
    """
    is_finite = images.isfinite().all(dim=-1).all(dim=-1) & squares.isfinite()
    clean = torch.where(is_finite[:, None, None], images, 0.0)
    # A matrix may have jumped far from its last scale: squares of its images must hold.
    peak = clean.abs().amax(dim=(-2, -1))
    peak = torch.where(peak > 0, peak, 1.0)
    z, w = _rotated(vectors, clean / peak[:, None, None])
    ritz = (z[:, 0] * w[:, 0]).sum(dim=-1).clamp_min(0.0)
    length = torch.linalg.vector_norm(w[:, 0], dim=-1)
    is_seen = ritz > 0
    divisor = torch.where(is_seen, ritz, 1.0)
    # Of a Ritz value that rounding has left, the quotient could be anything.
    sigma = torch.where(is_seen, length / divisor.sqrt() * peak.sqrt(), 0.0)
    off = torch.linalg.vector_norm(w[:, 0] - ritz[:, None] * z[:, 0], dim=-1)
    residual = torch.where(is_seen, off / divisor, (squares > 0).to(ritz.dtype))
    sigma, residual = (torch.where(is_finite, x, torch.nan) for x in (sigma, residual))
    found = torch.stack([sigma.double(), squares.double().sqrt(), residual.double()], dim=-1)
    moved = _orthonormal_pair(w, z)
    return torch.where((is_finite & is_seen)[:, None, None], moved, vectors), found


def _rotated(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ritz vectors and their images, the larger value first."""
    if vectors.shape[1] == 1:
        return vectors, images
    core = vectors @ images.mT
    a, d = core[:, 0, 0], core[:, 1, 1]
    b = (core[:, 0, 1] + core[:, 1, 0]) / 2
    # The rotation that makes a symmetric 2 × 2 diagonal; eigh would read back from the device.
    angle = torch.atan2(2 * b, a - d) / 2
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return rotation @ vectors, rotation @ images


def _orthonormal_pair(w: Tensor, z: Tensor) -> Tensor:
    """Gram–Schmidt, twice; z, orthonormal, where nothing is left of a second image."""
    first = _unit(w[:, 0], z[:, 0])
    if w.shape[1] == 1:
        return first.unsqueeze(1)
    second = _unit(w[:, 1], z[:, 1])
    left = _without(second, first)
    is_lost = torch.linalg.vector_norm(left, dim=-1, keepdim=True) < 1e-3
    left = torch.where(is_lost, _without(z[:, 1], first), left)
    second = _unit(_without(_unit(left, z[:, 1]), first), z[:, 1])
    return torch.stack([first, second], dim=1)


def _without(vector: Tensor, unit: Tensor) -> Tensor:
    return vector - (vector * unit).sum(dim=-1, keepdim=True) * unit


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(length > 0, vector / torch.where(length > 0, length, 1.0), otherwise)


def _orthonormal(block: Tensor, basis: Tensor, filler: Tensor) -> Tensor:
    """Return orthonormal rows, orthogonal to those of the basis; the filler's where none is left.

    A row in the span of the basis, or mapped to nothing, leaves rounding, which after some rounds
    lies within the span itself.
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


def _stored(slot: MatrixRef, part: Part, *, is_whole: bool) -> Tensor | None:
    """Return what is here of a matrix as it is stored, (rows, c), sharing memory where it can."""
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
            # Products of a narrow matrix are many times slower on a CPU than those of vectors.
            image.addmv_(block.mT, torch.mv(block, vector))
        # One norm of all is slow for rows that lie apart, and one a row for those that do not.
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
    """Do the same for stored matrices of one shape, at most 64 MiB at a time."""
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
    """Return these scales where they and one over them are ordinary numbers, else the others."""
    scale, tiny = scale.to(otherwise.dtype), torch.finfo(otherwise.dtype).tiny
    return torch.where((scale >= tiny) & (scale <= 1 / tiny), scale, otherwise)


def _sent(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    """Return host numbers on a device, whose host does not wait for it."""
    here = torch.tensor(values)
    if device.type == "cuda":  # from memory that may be paged a copy is waited for
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


def _is_plausible(one: TrackedSpectrum) -> bool:
    """Whether no square has overflown or vanished: ‖W‖_F is at least σ₁, and neither is 0.

    A sum of squares is NaN only where an entry is: of that matrix nothing more is to be known.
    """
    if math.isnan(one.frobenius):
        return True
    return math.isfinite(one.residual) and 0 < one.sigma <= one.frobenius * (1 + 1e-3)
