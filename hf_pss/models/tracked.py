"""σ₁, ‖W‖_F and the stable rank of every selected matrix, tracked from step to step.

The package has four methods for σ₁. Each one has a different purpose and a different accuracy. All
methods but the first approach σ₁ from below.

- `SpectrumTracker`, in this module, keeps two vectors per matrix and makes one to three rounds of
  subspace iteration per update. The detectors of weights update one whenever they read it, and the
  health metrics of a run update one at every step. They share it if both happen at every step.
  Where its residual leaves open on which side of its floor a matrix lies, `Measurements` reads that
  matrix from scratch.
- `spectral_norm` without ``num_rounds`` is exact and uses an SVD. The bounds of attention logits
  and `hf-pss health --exact` use it.
- `spectral_norm` and `quick_stable_rank` with `QUICK_ROUNDS` start from scratch at each reading. On
  noise the stable rank is too high by at most 0.3 % up to a side of 64, and by at most 4 % at
  768×768. `hf-pss health`, single readings, and matrices that the tracker cannot judge use them.
- `leading_triplets` is within 1e-4 on noise of 768×768, and starts from scratch. Smoothing uses it.
  The record of `hf_pss.models.anchors` uses it with half of the rounds, within 1.6 %.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_pss.detection.state import JSON, read_mapping, read_text
from hf_pss.errors import StateError
from hf_pss.linalg import frobenius_norm, leading_triplets, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.linalg.subspace_rounds import orthonormal_pairs, orthonormal_rows, ritz_round
from hf_pss.models.batching import MatrixRef, matrix_refs, measure_each
from hf_pss.models.distributed import Backend, Part, Replicated
from hf_pss.models.selection import MatrixView

# Vectors per matrix. The second one tracks the direction that may overtake the first. With two
# vectors, a block is used five times, and all uses but the first are served by the cache.
_WIDTH = 2
# Elements of a block. 1 MiB of fp32 fits into the L2 cache of one core.
_BLOCK_ELEMENTS = 2**18
# Rounds of the Krylov space in the first refresh, before its one ordinary round.
_COLD_ROUNDS = 16
# Extra rounds per step for a matrix with a large residual. The limit is half the limit for stale
# values, because the vectors of a changing matrix lag behind before the residual shows it [ours].
_EXTRA_ROUNDS, _EXTRA_ABOVE = 2, 0.01
# Rounds per step on devices with enough bandwidth.
_DEVICE_ROUNDS = 2
# By Weyl's theorem, an eigenvalue of WᵀW lies within residual · σ² of σ². So a singular value of W
# lies within half of that share.
_STALE_ABOVE = 0.02
_SEED = 20261121
# The number of fp32 elements (64 MiB) in one batched call on an accelerator. It also limits the
# Krylov spaces that a cold start holds at the same time.
_MAX_ELEMENTS = 2**24
# Up to this number of elements, a matrix is copied into a stack on a CPU as well. The number of
# calls dominates the time of such matrices, and one batched call serves all of them.
_SMALL_ELEMENTS = 2**16
# What `SpectrumTracker.state` holds of a matrix before its vectors: σ₁, ‖W‖_F, the residual, the
# scale, and whether the next refresh owes it extra rounds.
_NUM_NUMBERS = 5


@dataclass(frozen=True, slots=True)
class TrackedSpectrum:
    """The numbers of one matrix, in its units. All are NaN if the matrix holds NaN or inf."""

    sigma: float
    """σ₁, approached from below."""
    frobenius: float
    """‖W‖_F."""
    residual: float
    """‖WᵀWv − s²v‖ / s² of the tracked unit vector v, with s = ‖Wv‖. Some singular value lies
    within half of that share. The residual is near 0 if one direction stands out. On noise, whose
    first values are close together, it is far above the error of σ₁."""

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / σ₁², from above. 0 for the zero matrix, as in `hf_pss.linalg.stable_rank`."""
        if self.sigma == 0:
            return 0.0 if self.frobenius == 0 else math.nan
        return (self.frobenius / self.sigma) ** 2

    @property
    def is_stale(self) -> bool:
        """Whether the bound on the error of σ₁ exceeds 1 %, or is NaN."""
        return not self.residual <= _STALE_ABOVE

    def is_doubtful(self, floor: float) -> bool:
        """Whether the stable rank may be below a floor that this estimate from above reaches.

        The residual bounds the error of σ² if σ is near the leading value.
        """
        return floor <= self.stable_rank < floor * (1 + self.residual)


@dataclass(slots=True)
class _Group:
    """Matrices whose vectors have the same length, dtype and device. k is 2."""

    slots: tuple[MatrixRef, ...]
    vectors: Tensor
    """(N, k, c), orthonormal rows. c is the last dimension of the stored tensor. Between refreshes
    the entries are rounded to bfloat16, which is how `SpectrumTracker.state` saves them."""
    scale: Tensor
    """(N,), the last σ₁. Vectors are divided by it before a product, so that nothing overflows."""
    found: Tensor
    """(N, 3), float64, on the device: σ₁, ‖W‖_F and the residual. NaN before the first round."""
    is_stacked: bool = False
    """Whether a refresh reads the matrices once, into stacks of one shape. The matrices are then
    small, and c is the largest of their last dimensions. Shorter vectors end with zeros."""

    @contextmanager
    def some(self, at: Sequence[int]) -> Iterator[_Group]:
        """Yield a group of only these matrices, and copy its results back at the end."""
        index = _sent(at, self.vectors.device)
        some = _Group(
            tuple(self.slots[i] for i in at),
            self.vectors.index_select(0, index),
            self.scale.index_select(0, index),
            self.found.index_select(0, index),
        )
        yield some
        self.vectors = self.vectors.index_copy(0, index, some.vectors)
        self.scale = self.scale.index_copy(0, index, some.scale)
        self.found = self.found.index_copy(0, index, some.found)


Tracked: TypeAlias = tuple[list[_Group], frozenset[str]]
"""The vectors of all matrices, and the names of those that the next refresh owes extra rounds."""


class SpectrumTracker:
    """Tracks σ₁ and ‖W‖_F of the selected matrices by reading the weights once per step.

    The method is subspace iteration on SᵀS with two vectors and Rayleigh–Ritz (Golub & Van
    Loan, Matrix Computations, section 8.2.4), where S is the matrix as it is stored. For each
    block of rows that fits into the cache it computes u = S_b V, Y += S_bᵀu and f += ‖S_b‖². So
    it reads main memory only once. From the Ritz vector z it computes σ = ‖SᵀSz‖ / ‖Sz‖, which
    is below σ₁ and above ‖Sz‖.

    The first `refresh` builds a block Krylov space of 16 rounds instead. `state` and `restore` let
    a resumed run continue with the same bits.

    Cost: light, for every step, without a read from the device until `read`. Under FSDP2 each rank
    multiplies the rows that it stores, and one sum over ranks combines them in each round. Under
    DDP each replica does all the work. Each rank of ZeRO also does all the work, on the copy for
    the forward pass. Stage 3 gathers that copy in every round, one parameter at a time.

    Args:
        views: The matrices to track.
        backend: How parameters are stored.
        batched: Stack matrices of equal shape for one batched call. On a CPU this is slower for
            large matrices. None means yes on all devices except a CPU.
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
        """Update all numbers to the current weights. Only a cold start reads from the device.

        Matrices with a residual above 1 % get up to two more rounds. On a CPU they get these rounds
        immediately. On other devices, and if parameters are sharded, only the matrices that the
        last `read` found get them. All ranks must call it.
        """
        if not self._slots:
            return
        if not self._groups:
            groups = self._grouped(parameters)
            for group in groups:
                self._start_cold(group, parameters)
            # Set this last, so that a cold start that raises is repeated.
            self._groups = groups
        for group in self._groups:
            if group.is_stacked:
                self._rounds_of_stacks(group, parameters)
                continue
            for _ in range(1 if group.vectors.device.type == "cpu" else _DEVICE_ROUNDS):
                self._round(group, parameters)
            for _ in range(_EXTRA_ROUNDS):
                unsettled = self._unsettled_in(group)
                if not unsettled:
                    break
                with group.some(unsettled) as some:
                    self._round(some, parameters, is_first=False)
            group.vectors = group.vectors.bfloat16().to(group.vectors.dtype)
        self._unsettled = frozenset()

    @torch.no_grad()
    def read(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, TrackedSpectrum]:
        """Return the numbers of the last `refresh` by name, with one device-to-host read.

        Squares of entries beyond 1e19 or below 1e-22 do not fit into fp32. Matrices with these
        entries, and matrices that hold inf or only zeros, are scaled and measured separately, with
        one or two more reads. All ranks must call it.

        Args:
            parameters: As in `refresh`. Only the few matrices that are
                measured separately are read.
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
        """Call `refresh` and return the result of `read`."""
        self.refresh(parameters)
        return self.read(parameters)

    @torch.no_grad()
    def directions(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return v₁ of each matrix by name, (n,), from the last `refresh`.

        Each vector is on the device and has length 1. It is zero for a zero matrix, and NaN for a
        matrix that is not finite. All ranks must call it.
        """
        found: dict[str, Tensor] = {}
        turned: dict[str, Tensor] = {}
        for group in self._groups:
            sigma = group.found[:, :1]
            # The value is 0, 1 or NaN.
            known = torch.where(sigma.isnan(), sigma, (sigma > 0).double()).to(group.vectors.dtype)
            for slot, padded in zip(group.slots, group.vectors[:, 0] * known, strict=True):
                vector = functional.normalize(padded[: _num_columns(slot)], dim=0)
                found[slot.name] = vector
                if not slot.view.transposed:
                    continue
                # The matrix is stored as inputs × outputs, so the vector is
                # u₁. One product gives v₁.
                v = turned[slot.name] = vector.new_zeros(slot.shape[1])
                parameter = parameters[slot.view.parameter_name]
                with self._backend.read_part(parameter) as part:
                    stored = _stored(slot, part, parameter)
                    if stored is not None:
                        # The rows of one expert are never divided among ranks.
                        start = 0 if slot.expert is not None else part.start
                        v[start : start + len(stored)] = stored.to(v.dtype) @ vector
        if turned:
            whole = torch.cat(list(turned.values()))
            self._backend.total_(whole)
            sizes = [len(v) for v in turned.values()]
            for name, v in zip(turned, torch.split(whole, sizes), strict=True):
                found[name] = functional.normalize(v, dim=0)
        return {slot.name: found[slot.name] for slot in self._slots if slot.name in found}

    def state(self) -> dict[str, JSON] | None:
        """Return what the next `refresh` depends on, as strict JSON, or None before the first one.

        The size is 2.7 bytes for each entry of a vector: 450 kB for GPT-2 124M.
        """
        if not self._groups:
            return None
        found: dict[str, JSON] = {}
        for group in self._groups:
            owed = [float(slot.name in self._unsettled) for slot in group.slots]
            columns = group.found, group.scale.double()[:, None], group.scale.new_tensor(owed)
            numbers = torch.cat([*columns[:2], columns[2].double()[:, None]], dim=1).cpu()
            halves = group.vectors.bfloat16().cpu()
            for slot, row, vectors in zip(group.slots, numbers, halves, strict=True):
                both = _bytes(row) + _bytes(vectors[:, : _num_columns(slot)])
                found[slot.name] = base64.b64encode(both).decode("ascii")
        return found

    def parsed(self, state: object, parameters: Mapping[str, nn.Parameter]) -> Tracked:
        """Return what `restore` needs, without a change of the tracker.

        Args:
            state: Parsed JSON, which is not trusted. None means a cold start.
            parameters: As in `refresh`.

        Raises:
            StateError: The state is damaged, or belongs to different matrices.
        """
        if state is None:
            return [], frozenset()
        what = "the state of the tracked spectra"
        saved = read_mapping(state, what)
        if set(saved) != {slot.name for slot in self._slots}:
            raise StateError(
                f"{what.capitalize()} belongs to a model with different weight matrices. Load the "
                "state that was saved with this model."
            )
        groups, unsettled = self._grouped(parameters), set()
        for group in groups:
            numbers, vectors = [], []
            width, size = group.vectors.shape[1:]
            for slot in group.slots:
                text = read_text(saved[slot.name], f"{slot.name!r} in {what}")
                shape = (width, _num_columns(slot))
                row, block = _decoded(text, shape, f"{slot.name!r} in {what}")
                numbers.append(row)
                vectors.append(_padded(block, size))
                if row[-1]:
                    unsettled.add(slot.name)
            rows = torch.stack(numbers)
            group.vectors = torch.stack(vectors).to(group.vectors)
            group.found = rows[:, :3].to(group.found)
            group.scale = _usable(rows[:, 3].to(group.scale), group.scale)
        return groups, frozenset(unsettled)

    def restore(self, tracked: Tracked) -> None:
        """Continue from a state that `parsed` has read."""
        self._groups, self._unsettled = tracked

    # ---- inside ----

    def _grouped(self, parameters: Mapping[str, nn.Parameter]) -> list[_Group]:
        alike: dict[tuple[int, int, torch.dtype, torch.device], list[MatrixRef]] = {}
        for slot in self._slots:
            parameter = parameters[slot.view.parameter_name]
            size = _num_columns(slot)
            # 0: small matrices share a group, whatever their sizes are.
            alone = 0 if self._is_stacked(slot, parameter) else size
            key = (alone, min(_WIDTH, size), compute_dtype(parameter), parameter.device)
            alike.setdefault(key, []).append(slot)
        generator = torch.Generator().manual_seed(_SEED)
        groups = []
        for (alone, width, dtype, device), slots in alike.items():
            slots.sort(key=_stored_shape)  # matrices of one stack are neighbours
            size = alone or max(map(_num_columns, slots))
            drawn = torch.randn(size, width, generator=generator, dtype=torch.float64)
            start = torch.linalg.qr(drawn).Q.mT.to(device, dtype)
            vectors = start.expand(len(slots), -1, -1).contiguous()
            nothing = torch.full((len(slots), 3), math.nan, dtype=torch.float64, device=device)
            scale = vectors.new_ones(len(slots))
            groups.append(_Group(tuple(slots), vectors, scale, nothing, is_stacked=not alone))
        return groups

    def _is_stacked(self, slot: MatrixRef, parameter: Tensor) -> bool:
        """Return whether a refresh copies this matrix into a stack."""
        is_here = parameter.device.type == "cpu" and not self._backend.is_shared
        return is_here and self._batched is None and math.prod(slot.shape) <= _SMALL_ELEMENTS

    @staticmethod
    def _stacks(group: _Group, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """Return copies of the matrices of a group, (b, r, c) for each shape."""
        return [
            torch.stack(
                [slot.read_stored(parameters[slot.view.parameter_name].detach()) for slot in slots]
            ).to(group.vectors.dtype)
            for _, slots in itertools.groupby(group.slots, key=_stored_shape)
        ]

    def _rounds_of_stacks(self, group: _Group, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make all rounds for each matrix of a group, with one reading and few calls.

        The vectors are made orthonormal only before the last round. Until then the second one may
        lose digits to the first one.
        """
        stacks = self._stacks(group, parameters)
        sizes = [len(stack) for stack in stacks]
        inverses = torch.split(group.scale.reciprocal()[:, None, None], sizes)
        for stack, inverse in zip(stacks, inverses, strict=True):
            stack *= inverse

        def product(vectors: Tensor) -> Tensor:
            images = []
            for block, stack in zip(torch.split(vectors, sizes), stacks, strict=True):
                image = (block[..., : stack.shape[-1]] @ stack.mT) @ stack
                images.append(_padded(image, vectors.shape[-1]))
            return torch.cat(images)

        vectors = group.vectors
        for _ in range(_EXTRA_ROUNDS):
            vectors = product(vectors)
        vectors = orthonormal_pairs(vectors, group.vectors)
        norms = torch.cat([torch.linalg.vector_norm(stack.flatten(1), dim=1) for stack in stacks])
        moved, found = ritz_round(vectors, product(vectors), norms.square())
        is_broken = found[:, 0].isnan()[:, None, None]
        moved = torch.where(is_broken, group.vectors, moved)
        found[:, :2] *= group.scale.double().unsqueeze(-1)
        group.vectors, group.found = moved.bfloat16().to(moved.dtype), found
        group.scale = _usable(found[:, 0], group.scale)

    def _unsettled_in(self, group: _Group) -> list[int]:
        """Return the matrices that need more rounds.

        On a CPU their current residuals decide, and otherwise the last `read`. All replicas find
        the same matrices, and their rounds need no other rank.
        """
        waits = self._backend.is_shared and type(self._backend) is not Replicated
        if group.found.device.type != "cpu" or waits:
            return [i for i, slot in enumerate(group.slots) if slot.name in self._unsettled]
        # If the residual is NaN, more rounds do not help.
        return [i for i, off in enumerate(group.found[:, 2].tolist()) if off > _EXTRA_ABOVE]

    def _round(
        self, group: _Group, parameters: Mapping[str, nn.Parameter], *, is_first: bool = True
    ) -> None:
        """Do one round. The first round of a refresh also measures ‖W‖_F."""
        images, squares = self._products(group, group.vectors, parameters, squares=is_first)
        moved, found = ritz_round(group.vectors, images, squares)
        found[:, :2] *= group.scale.double().unsqueeze(-1)
        if not is_first:
            found[:, 1] = group.found[:, 1]
        group.vectors, group.found = moved, found
        group.scale = _usable(found[:, 0], group.scale)

    def _start_cold(self, group: _Group, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the two leading Ritz vectors of a block Krylov space of SᵀS into the group.

        This is algorithm 2 of Musco & Musco 2015, arXiv 1504.05477, on the Gram matrix. The Gram
        matrix keeps the first values and loses those below 3e-4 σ₁. The decompositions read
        LAPACK's status from the device.
        """
        if group.is_stacked:
            stacks = self._stacks(group, parameters)
            width, size = group.vectors.shape[1:]
            found = [leading_triplets(stack, width, check_finite=False) for stack in stacks]
            leading = torch.cat(
                [_padded(_completed(one.v.mT, group.vectors[0]), size) for one in found]
            )
            is_finite = leading.isfinite().flatten(1).all(dim=1)[:, None, None]
            group.vectors = torch.where(is_finite, leading, group.vectors)
            sigmas = torch.cat([one.sigma[:, 0] for one in found])
            group.scale = _usable(sigmas, group.scale)
            return
        num_rows = 2 * (_COLD_ROUNDS + 1) * group.vectors.shape[1]  # of the basis and its images
        size = max(1, _MAX_ELEMENTS // (num_rows * group.vectors.shape[2]))
        for first in range(0, len(group.slots), size):
            with group.some(range(first, min(first + size, len(group.slots)))) as chunk:
                self._start_chunk_cold(chunk, parameters)

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
        # The next round multiplies these vectors again, so its value is below σ₁.
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

        Without `squares`, the second tensor holds ones.
        """
        inverse = group.scale.reciprocal()
        scaled = vectors * inverse[:, None, None]
        images = torch.zeros_like(vectors)
        norms = [vectors.new_zeros(())] * len(group.slots)
        batch: dict[tuple[int, torch.dtype], list[tuple[int, Tensor]]] = {}
        is_batched = vectors.device.type != "cpu" if self._batched is None else self._batched
        # A product with a vector keeps only one core busy, so each core works
        # on different matrices.
        tasks: dict[int, Future[Tensor]] = {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i, slot in enumerate(group.slots):
                parameter = parameters[slot.view.parameter_name]
                with self._backend.read_part(parameter) as part:
                    stored = _stored(slot, part, parameter)
                    if stored is None:
                        continue
                    if is_batched:
                        batch.setdefault((len(stored), stored.dtype), []).append((i, stored))
                        continue
                    tasks[i] = pool.submit(
                        _add_blockwise_, images[i], stored, scaled[i], norm=squares
                    )
                    if self._backend.is_shared:  # the tensor may exist only during this read
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
        """Measure matrices that overflow or vanish. Their vectors and residuals have no meaning.

        Collective, like `measure_each`. Every rank passes the same names.
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


def _stored_shape(slot: MatrixRef) -> tuple[int, int]:
    """Return the shape (r, c) of a matrix as stored."""
    return slot.shape[::-1] if slot.view.transposed else slot.shape


def _num_columns(slot: MatrixRef) -> int:
    return _stored_shape(slot)[1]


def _completed(vectors: Tensor, others: Tensor) -> Tensor:
    """Return as many orthonormal rows as the other vectors are. A single row has one triplet."""
    missing = len(others) - vectors.shape[1]
    if missing <= 0:
        return vectors
    more = others[-missing:, : vectors.shape[2]].expand(len(vectors), -1, -1)
    basis: Tensor = torch.linalg.qr(torch.cat([vectors, more], dim=1).mT).Q
    return basis.mT


def _padded(vectors: Tensor, size: int) -> Tensor:
    """Return vectors with zeros at their end, up to a size."""
    missing = size - vectors.shape[-1]
    return functional.pad(vectors, (0, missing)) if missing else vectors


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _decoded(text: str, shape: tuple[int, int], what: str) -> tuple[Tensor, Tensor]:
    """Return the numbers of a matrix, float64, and its vectors, bfloat16."""
    try:
        found = bytearray(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        found = bytearray()
    start = 8 * _NUM_NUMBERS
    if len(found) != start + 2 * math.prod(shape):
        raise StateError(f"{what} is damaged. Load a state of this model that PSS has saved.")
    numbers = torch.frombuffer(found, dtype=torch.float64, count=_NUM_NUMBERS)
    vectors = torch.frombuffer(found, dtype=torch.bfloat16, offset=start).view(shape)
    if not bool(vectors.isfinite().all()):
        raise StateError(f"{what} is damaged: its vectors are not finite.")
    return numbers, vectors


def _stored(slot: MatrixRef, part: Part, parameter: Tensor) -> Tensor | None:
    """Return this rank's rows of a matrix as stored, (rows, c), sharing memory if possible."""
    if len(part.tensor) == parameter.shape[0]:
        return slot.read_stored(part.tensor)
    piece = slot.view.piece(part.tensor, part.start, slot.expert)
    if piece is None:
        return None
    found = piece.read()
    return found.mT if slot.view.transposed else found


@torch.no_grad()  # a new thread starts without it
def _add_blockwise_(images: Tensor, stored: Tensor, vectors: Tensor, *, norm: bool) -> Tensor:
    """Add SᵀSv to each of the images, one block of S at a time. Return ‖S‖_F, or 0."""
    found = [images.new_zeros(())]
    for part in torch.split(stored, max(1, _BLOCK_ELEMENTS // stored.shape[-1])):
        block = part.to(images.dtype)
        for image, vector in zip(images, vectors, strict=True):
            # On a CPU, products with a narrow matrix are far slower than products with vectors.
            image.addmv_(block.mT, torch.mv(block, vector))
        # For rows that are not adjacent, one norm of all rows is slow. For adjacent rows, one norm
        # per row is slow.
        if norm and block.is_contiguous():
            found.append(torch.linalg.vector_norm(block))
        elif norm:
            found.append(torch.linalg.vector_norm(torch.linalg.vector_norm(block, dim=-1)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(found))
    return total


def _add_batched_(
    images: Tensor, norms: list[Tensor], members: Sequence[tuple[int, Tensor]], vectors: Tensor
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
    """Return the scales that are normal numbers with normal inverses, and else the other values."""
    scale, tiny = scale.to(otherwise.dtype), torch.finfo(otherwise.dtype).tiny
    return torch.where((scale >= tiny) & (scale <= 1 / tiny), scale, otherwise)


def _sent(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy host numbers to a device without waiting for it."""
    here = torch.tensor(values)
    if device.type == "cuda":  # a copy from pageable memory would wait
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


def _is_plausible(one: TrackedSpectrum) -> bool:
    """Return whether no square overflowed or vanished: ‖W‖_F is at least σ₁, and neither is 0.

    A sum of squares is NaN only if an entry is NaN. For such a matrix there are no other numbers.
    """
    if math.isnan(one.frobenius):
        return True
    return math.isfinite(one.residual) and 0 < one.sigma <= one.frobenius * (1 + 1e-3)
