"""The interface to a model that is spread over ranks; one process, and DDP's replicas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start`` to ``start + len(tensor)`` of a stored tensor, along its first dimension."""

    tensor: Tensor
    """Writable; may have no row at all."""
    start: int = 0


class Backend(ABC):
    """The storage of a model's parameters over devices and ranks.

    Every method is collective (all ranks call it, in the same order), except `part` where every
    rank holds whole parameters. The ranks that share work are numbered 0 … ``world_size − 1``.
    """

    is_shared: ClassVar[bool] = False
    """Whether several ranks train the model together."""
    can_hold_back: ClassVar[bool] = True
    """Whether the gradient norm is known before the update happens."""

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return warnings about this backend for the user, a sentence each."""
        return ()

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank, among those that share work."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of ranks that share work."""

    @abstractmethod
    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter on every rank, detached, for reading only."""

    @abstractmethod
    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Make ``full``, the same on every rank, the value of the parameter everywhere."""

    @abstractmethod
    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of this rank's storage of a parameter, for `put_back_`."""

    @abstractmethod
    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Restore the parameter, bit for bit, as it was when `keep` was called on every rank."""

    def master(self, parameter: Tensor) -> Tensor:
        """Return `full` of the copy that the optimizer updates, which may be more precise."""
        return self.full(parameter)

    @abstractmethod
    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return rows ``start:stop`` (None: all) at the owner, for reading; None elsewhere."""

    @abstractmethod
    def part(self, parameter: Tensor, rows: slice | None = None) -> AbstractContextManager[Part]:
        """Give this rank's part of a parameter, to be changed in place until the block ends.

        Changes outside of the rows may be lost.
        """

    @abstractmethod
    def moment_part(
        self,
        optimizer: Optimizer,
        parameter: Tensor,
        names: Sequence[str],
        rows: slice | None = None,
    ) -> AbstractContextManager[Part | None]:
        """Give `part` of the first of these optimizer states that the parameter has, or None."""

    def read_part(self, parameter: Tensor) -> AbstractContextManager[Part]:
        """Give this rank's part of a parameter, as the forward pass uses it, for reading only."""
        return self.part(parameter)

    def read_moment(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> AbstractContextManager[Part | None]:
        """Give `read_part` of the first of these optimizer states that it has, or None."""
        return self.moment_part(optimizer, parameter, names)

    @abstractmethod
    def send_(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor on every rank with the owner's."""

    @abstractmethod
    def total_(self, tensor: Tensor) -> None:
        """Add up, in place, the ranks' shares of a sum over `part` or `read_part`."""

    @abstractmethod
    def sum_to_host(self, values: Tensor) -> list[float]:
        """Return the sum of device numbers, shape (k,), over all ranks, as host floats.

        Each number belongs to one rank; all others hold 0 in its place.
        """

    @abstractmethod
    def agree(self, values: Tensor) -> list[float]:
        """Return device numbers, shape (k,), as host floats that are the same on every rank."""


@dataclass(frozen=True, slots=True)
class OneProcess(Backend):
    """One process: every parameter is whole and local, and nothing is communicated."""

    @property
    def rank(self) -> int:
        """The only rank."""
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

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Do nothing."""

    def total_(self, tensor: Tensor) -> None:
        """Do nothing: a part is the whole."""

    def sum_to_host(self, values: Tensor) -> list[float]:
        """Return the numbers."""
        return self.agree(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the numbers. This is the step's one device-to-host read."""
        host: list[float] = values.tolist()
        return host


class ManyRanks(Backend):
    """Numbers that several ranks reduce to the same host floats."""

    is_shared: ClassVar[bool] = True

    def sum_to_host(self, values: Tensor) -> list[float]:
        """Add up over all ranks of the run, in float64."""
        return _all_reduced(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the mean over all ranks of the run, so that NaN on one is NaN on all.

        In float64 the mean of equal float32 numbers is that number, bit for bit.
        """
        return _all_reduced(values, divisor=dist.get_world_size())


@dataclass(frozen=True, slots=True)
class Replicated(ManyRanks, OneProcess):
    """DDP: every rank holds every parameter, and all make the same edit.

    Gradients and weights are bit-identical on all ranks, but losses are not: a NaN on one rank must
    not make that rank alone skip an update. One rank decomposes each matrix and sends the result;
    all apply it by the same operations, so replicas stay equal bit for bit.
    """

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


def _all_reduced(values: Tensor, divisor: int = 1) -> list[float]:
    total = values.double()
    dist.all_reduce(total)
    host: list[float] = (total / divisor).tolist()
    return host


def to_owner(
    piece: Tensor, lengths: Sequence[int], owner: int, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Concatenate the ranks' pieces at the owner, and return None elsewhere.

    Only the pieces are transferred, and only the owner needs memory for them.

    Args:
        piece: (lengths[rank], ...), this rank's.
        lengths: Length of every rank's piece, in the group's order; 0 for none.
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
