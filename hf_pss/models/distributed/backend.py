"""What smoothing must know of how a model is spread over ranks; one process, and replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Backend", "OneProcess", "Part", "Replicated"]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start`` to ``start + len(tensor)`` of a stored tensor, along its first dimension."""

    tensor: Tensor
    """Writable; may have no row at all."""
    start: int = 0


class Backend(Protocol):
    """How a model is spread over devices and ranks.

    Every method but `part` of a backend without shards is collective: all ranks call it, in the
    same order. The ranks that share out work are numbered 0 … ``world_size − 1``.
    """

    can_hold_back: ClassVar[bool]
    """Whether an update has not happened yet when its gradient norm is known."""

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return what the user should be told of this backend, a sentence each."""

    @property
    def is_shared(self) -> bool:
        """Whether several ranks train the model together."""

    @property
    def rank(self) -> int:
        """This rank, among those that share out the work."""

    @property
    def world_size(self) -> int:
        """How many share out the work."""

    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter on every rank, detached; writing into it changes nothing."""

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Make ``full``, the same on every rank, the value of the parameter everywhere."""

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of what is stored here of a parameter, for `put_back_`."""

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Make the parameter, bit for bit, what it was when `keep` was called on every rank."""

    def master(self, parameter: Tensor) -> Tensor:
        """Return the same of what the optimizer updates, which may be more precise."""

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return rows ``start:stop`` (None: all) at the owner, to be read; None at all others."""

    def part(self, parameter: Tensor, rows: slice | None = None) -> AbstractContextManager[Part]:
        """Give what is kept here of a parameter, to be changed in place until the block ends.

        Changes outside of the rows may be lost.
        """

    def moment_part(
        self,
        optimizer: Optimizer,
        parameter: Tensor,
        names: Sequence[str],
        rows: slice | None = None,
    ) -> AbstractContextManager[Part | None]:
        """Give the same of the first of these optimizer states that the parameter has, or None."""

    def look(self, parameter: Tensor) -> AbstractContextManager[Part]:
        """Give what is kept here of a parameter, as the forward sees it, to be read only."""

    def look_at_moment(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> AbstractContextManager[Part | None]:
        """Give the same of the first of these optimizer states that the parameter has, or None."""

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor, everywhere, with the owner's."""

    def total_(self, tensor: Tensor) -> None:
        """Add up, in place, what the ranks hold of a sum over `part` or `look`."""

    def tell(self, values: Tensor) -> list[float]:
        """Return numbers, shape (k,), of which each rank knows its own and holds 0 for others'."""

    def agree(self, values: Tensor) -> list[float]:
        """Return device numbers, shape (k,), as host floats that are the same on every rank."""


@dataclass(frozen=True, slots=True)
class OneProcess:
    """The identity: every parameter is whole and here, and there is nobody to agree with."""

    is_shared: ClassVar[bool] = False
    can_hold_back: ClassVar[bool] = True

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def rank(self) -> int:
        """The only one."""
        return 0

    @property
    def world_size(self) -> int:
        """One."""
        return 1

    def full(self, parameter: Tensor) -> Tensor:
        """Return the parameter itself, detached: the same memory."""
        return parameter.detach()

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of the parameter."""
        return parameter.detach().clone()

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Copy it back."""
        parameter.detach().copy_(kept)

    def master(self, parameter: Tensor) -> Tensor:
        """Return the parameter itself, detached: the same memory."""
        return parameter.detach()

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Copy ``full`` into the parameter, unless it is the parameter's own memory."""
        if full.data_ptr() != parameter.data_ptr():
            with torch.no_grad():
                parameter.copy_(full)

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return the parameter itself, or these rows of it."""
        whole = parameter.detach()
        return None if owner != self.rank else whole if rows is None else whole[rows]

    @contextmanager
    def part(self, parameter: Tensor, rows: slice | None = None) -> Iterator[Part]:
        """Give the whole parameter."""
        yield Part(parameter.detach())

    @contextmanager
    def moment_part(
        self,
        optimizer: Optimizer,
        parameter: Tensor,
        names: Sequence[str],
        rows: slice | None = None,
    ) -> Iterator[Part | None]:
        """Give the whole moment."""
        moment = moment_of(optimizer, parameter, names)
        yield Part(moment) if moment is not None else None

    def look(self, parameter: Tensor) -> AbstractContextManager[Part]:
        """Give the whole parameter."""
        return self.part(parameter)

    def look_at_moment(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> AbstractContextManager[Part | None]:
        """Give the whole moment."""
        return self.moment_part(optimizer, parameter, names)

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Do nothing."""

    def total_(self, tensor: Tensor) -> None:
        """Do nothing: a part is the whole."""

    def tell(self, values: Tensor) -> list[float]:
        """Return the numbers."""
        return self.agree(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the numbers. This is the step's one device-to-host read."""
        host: list[float] = values.tolist()
        return host


@dataclass(frozen=True, slots=True)
class Replicated(OneProcess):
    """DDP: every rank holds every parameter, and all get the same edit.

    Gradients and weights are bit-identical on all ranks, losses are not: a NaN on one rank must not
    make that rank alone skip an update. Each matrix is decomposed by one rank; all apply what it
    sends, by the same operations, so replicas stay equal bit for bit.
    """

    is_shared: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        """The global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """All ranks."""
        return dist.get_world_size()

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Broadcast."""
        dist.broadcast(tensor, owner)

    def tell(self, values: Tensor) -> list[float]:
        """Add up over the ranks: each number is one rank's, and 0 on all others."""
        return sum_over_ranks(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the mean over ranks, so that NaN on one is NaN on all; every rank must call.

        In float64 the mean of equal float32 numbers is that number, bit for bit.
        """
        return mean_over_ranks(values)


def sum_over_ranks(values: Tensor) -> list[float]:
    """Return the sum over all ranks of the run, in float64."""
    total = values.double()
    dist.all_reduce(total)
    host: list[float] = total.tolist()
    return host


def mean_over_ranks(values: Tensor) -> list[float]:
    """Return the mean over all ranks of the run, in float64."""
    total = values.double()
    dist.all_reduce(total)
    host: list[float] = (total / dist.get_world_size()).tolist()
    return host


def to_owner(
    piece: Tensor, lengths: Sequence[int], owner: int, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Put the ranks' pieces one behind the other at the owner, and return None elsewhere.

    Nothing but the pieces travels, and nobody else needs memory for them.

    Args:
        piece: (lengths[rank], ...), this rank's.
        lengths: Of every rank's piece, in the group's order; 0 for nothing.
        owner: Its rank within the group.
        group: All ranks of it must call.
    """
    is_owner = dist.get_rank(group) == owner
    sends = [len(piece) if rank == owner else 0 for rank in range(len(lengths))]
    receives = list(lengths) if is_owner else [0] * len(lengths)
    collected = piece.new_empty(sum(receives), *piece.shape[1:])
    dist.all_to_all_single(collected, piece.contiguous(), receives, sends, group=group)
    return collected if is_owner else None


def moment_of(optimizer: Optimizer, parameter: Tensor, names: Sequence[str]) -> Tensor | None:
    """Return the first of these optimizer states that is laid out like the parameter."""
    state = optimizer.state.get(parameter, {})
    found = (state.get(name) for name in names)
    return next((m for m in found if isinstance(m, Tensor) and m.shape == parameter.shape), None)
