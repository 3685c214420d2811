"""The interface to a model that is spread over ranks, with backends for one process and DDP."""

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
    """A writable tensor. It may have no rows."""
    start: int = 0


class Backend(ABC):
    """How the parameters of a model are stored over devices and ranks.

    Every method is collective, which means that all ranks call it in the same order. The only
    exception is `part` if every rank holds complete parameters. The ranks that share work have the
    numbers 0 … ``world_size − 1``.
    """

    is_shared: ClassVar[bool] = False
    """Whether several ranks train the model together."""
    can_hold_back: ClassVar[bool] = True
    """Whether the gradient norm is known before the update happens."""

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return warnings about this backend for the user. Each warning is one sentence."""
        return ()

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this rank among the ranks that share work."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of ranks that share work."""

    @abstractmethod
    def full(self, parameter: Tensor) -> Tensor:
        """Return the complete parameter on every rank, detached. The caller must not change it."""

    @abstractmethod
    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Set the parameter on all ranks to ``full``, which must be the same on every rank."""

    @abstractmethod
    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of what this rank stores of a parameter, for `put_back_`."""

    @abstractmethod
    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Restore the parameter, bit for bit, to its value when every rank called `keep`."""

    def master(self, parameter: Tensor) -> Tensor:
        """Return `full` of the copy that the optimizer updates. It may be more precise."""
        return self.full(parameter)

    @abstractmethod
    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return rows ``start:stop`` (None: all) on the owner, for reading, and None elsewhere."""

    @contextmanager
    def part(self, parameter: Tensor, rows: slice | None = None) -> Iterator[Part]:
        """Give this rank's part of a parameter. You may change it in place until the block ends.

        Changes outside the given rows may be lost.
        """
        yield self.local(parameter.detach())

    @contextmanager
    def moment_part(
        self,
        optimizer: Optimizer,
        parameter: Tensor,
        names: Sequence[str],
        rows: slice | None = None,
    ) -> Iterator[Part | None]:
        """Give `part` of the first of these optimizer states that the parameter has, or None."""
        moment = moment_of(optimizer, parameter, names)
        yield None if moment is None else self.local(moment)

    def local(self, stored: Tensor) -> Part:
        """Return this rank's part of a stored tensor, which shares its memory."""
        return Part(stored)

    def read_part(self, parameter: Tensor) -> AbstractContextManager[Part]:
        """Give this rank's part of a parameter for reading, as the forward pass uses it."""
        return self.part(parameter)

    def read_moment(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> AbstractContextManager[Part | None]:
        """Give `read_part` of the first of these optimizer states that exists, or None."""
        return self.moment_part(optimizer, parameter, names)

    @abstractmethod
    def send_(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor on every rank with the owner's tensor."""

    @abstractmethod
    def total_(self, tensor: Tensor) -> None:
        """Add up, in place, the ranks' contributions to a sum over `part` or `read_part`."""

    @abstractmethod
    def sum_to_host(self, values: Tensor) -> list[float]:
        """Return the sum of device numbers, shape (k,), over all ranks, as host floats.

        Each number belongs to one rank. All other ranks hold 0 in its place.
        """

    @abstractmethod
    def agree(self, values: Tensor) -> list[float]:
        """Return device numbers, shape (k,), as host floats that are the same on every rank."""


@dataclass(frozen=True, slots=True)
class OneProcess(Backend):
    """One process. Every parameter is complete and local, and nothing is communicated."""

    @property
    def rank(self) -> int:
        """The number of the only rank."""
        return 0

    @property
    def world_size(self) -> int:
        """The number of ranks, which is one."""
        return 1

    def full(self, parameter: Tensor) -> Tensor:
        """Return the detached parameter, which shares its memory."""
        return parameter.detach()

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of the parameter."""
        return parameter.detach().clone()

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Copy ``kept`` back into the parameter."""
        parameter.detach().copy_(kept)

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Copy ``full`` into the parameter, unless both share the same memory."""
        if full.data_ptr() != parameter.data_ptr():
            with torch.no_grad():
                parameter.copy_(full)

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return the parameter or the given rows of it, without a copy."""
        whole = parameter.detach()
        return None if owner != self.rank else whole if rows is None else whole[rows]

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Do nothing."""

    def total_(self, tensor: Tensor) -> None:
        """Do nothing, because a part is the complete tensor."""

    def sum_to_host(self, values: Tensor) -> list[float]:
        """Return the numbers."""
        return self.agree(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the numbers. This is the only device-to-host read of the step."""
        host: list[float] = values.tolist()
        return host


class ManyRanks(Backend):
    """Combines the numbers of several ranks into the same host floats on all of them."""

    is_shared: ClassVar[bool] = True

    def sum_to_host(self, values: Tensor) -> list[float]:
        """Add up over all ranks of the run, in float64."""
        return _all_reduced(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return the mean over all ranks of the run. NaN on one rank gives NaN on all.

        The mean of equal float32 numbers, computed in float64, is the same number bit for bit.
        """
        return _all_reduced(values, divisor=dist.get_world_size())


@dataclass(frozen=True, slots=True)
class Replicated(ManyRanks, OneProcess):
    """DDP: every rank holds every parameter, and all ranks make the same edit.

    Gradients and weights are bit-identical on all ranks, but losses are not. If one rank has NaN,
    the other ranks must also skip the update. One rank decomposes each matrix and sends the result.
    All ranks apply it by the same operations, so replicas stay equal bit for bit.
    """

    @property
    def rank(self) -> int:
        """The global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return dist.get_world_size()

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Broadcast the owner's tensor."""
        dist.broadcast(tensor, owner)


def _all_reduced(values: Tensor, divisor: int = 1) -> list[float]:
    total = values.double()
    dist.all_reduce(total)
    host: list[float] = (total / divisor).tolist()
    return host


def to_owner(
    piece: Tensor, lengths: Sequence[int], owner: int, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Concatenate the ranks' pieces on the owner, and return None on other ranks.

    Only the pieces are transferred, and only the owner needs memory for all of them.

    Args:
        piece: (lengths[rank], ...), the piece of this rank.
        lengths: The length of every rank's piece, in the group's order. 0 means no piece.
        owner: The owner's rank within the group.
        group: The group. All its ranks must make the call.
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
