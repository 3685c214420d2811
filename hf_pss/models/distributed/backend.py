"""How a model is spread over ranks: one process, DDP, and the shards of FSDP2 and HSDP."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from hf_pss.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start`` to ``start + len(tensor)`` of a stored tensor, along its first dimension."""

    tensor: Tensor
    """A writable tensor. It may have no rows."""
    start: int = 0


class Backend:
    """How the parameters of a model are stored over devices and ranks. This class: one process.

    Derived classes override what differs if there are several ranks. Every method is collective,
    which means that all ranks call it in the same order. The only exception is `part` if every rank
    holds complete parameters. The ranks that share work have the numbers 0 … ``world_size − 1``.
    """

    is_shared: ClassVar[bool] = False
    """Whether several ranks train the model together."""
    can_hold_back: ClassVar[bool] = True
    """Whether the gradient norm is known before the update happens."""

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return warnings about this backend for the user. Each warning is one sentence."""
        return ()

    @property
    def rank(self) -> int:
        """The number of this rank among the ranks that share work."""
        return 0

    @property
    def world_size(self) -> int:
        """The number of ranks that share work."""
        return 1

    def full(self, parameter: Tensor) -> Tensor:
        """Return the complete parameter on every rank, detached. The caller must not change it."""
        return gathered(parameter.detach())

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Set the parameter on all ranks to ``full``, which must be the same on every rank."""
        if full.data_ptr() != parameter.data_ptr():
            with torch.no_grad():
                parameter.copy_(full)

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of what this rank stores of a parameter, for `put_back_`."""
        return self.local(parameter.detach()).tensor.clone()

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Restore the parameter, bit for bit, to its value when every rank called `keep`."""
        self.local(parameter.detach()).tensor.copy_(kept)

    def master(self, parameter: Tensor) -> Tensor:
        """Return `full` of the copy that the optimizer updates. It may be more precise."""
        return self.full(parameter)

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Return rows ``start:stop`` (None: all) on the owner, for reading, and None elsewhere."""
        whole = parameter.detach()
        return None if owner != self.rank else whole if rows is None else whole[rows]

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
        state = optimizer.state.get(parameter, {})
        found = (state.get(name) for name in names)
        # The state must be laid out like the parameter.
        like = (m for m in found if isinstance(m, Tensor) and m.shape == parameter.shape)
        moment = next(like, None)
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

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor on every rank with the owner's tensor."""

    def total_(self, tensor: Tensor) -> None:
        """Add up, in place, the ranks' contributions to a sum over `part` or `read_part`.

        If every rank holds complete parameters, a part is the complete tensor, and nothing happens.
        """

    def sum_to_host(self, values: Tensor) -> list[float]:
        """Return the sum of device numbers, shape (k,), over all ranks, as host floats.

        Each number belongs to one rank. All other ranks hold 0 in its place.
        """
        return self.agree(values)

    def agree(self, values: Tensor) -> list[float]:
        """Return device numbers, shape (k,), as host floats that are the same on every rank."""
        host: list[float] = values.tolist()
        return host

    def ranks_with(self, is_true: bool, device: torch.device) -> tuple[int, ...]:
        """Return the global ranks that pass True, the same on every rank.

        Args:
            is_true: What this rank passes.
            device: A device that the ranks communicate with.
        """
        return (0,) if is_true else ()


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

    def ranks_with(self, is_true: bool, device: torch.device) -> tuple[int, ...]:
        """Add up one number per rank."""
        flags = torch.zeros(dist.get_world_size(), device=device)
        flags[dist.get_rank()] = is_true
        return tuple(rank for rank, flag in enumerate(_all_reduced(flags)) if flag)


class Replicated(ManyRanks):
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


@dataclass(frozen=True, slots=True)
class Sharded(ManyRanks):
    """Every rank stores some rows of each parameter. Only the owner has a complete matrix.

    Under HSDP all ranks of all replicas share the work. Each matrix has one owner. The owner
    gathers the rows from its replica and sends the result to every rank, so replicas stay equal
    bit for bit. After an evaluation FSDP2 temporarily replaces shards by plain tensors. The
    methods of this class run after an update, when the shards are back, but they still check
    the type of each tensor.
    """

    replicas: tuple[tuple[int, ...], ...]
    """Global ranks, in the order of the shards. Each replica has one row, and
    FSDP2 has one replica."""
    group: dist.ProcessGroup
    """The ranks in the same row as this rank."""

    @property
    def rank(self) -> int:
        """The number of this rank, counted row by row."""
        return self._ranks.index(dist.get_rank())

    @property
    def world_size(self) -> int:
        """The number of ranks in all replicas."""
        return len(self._ranks)

    @property
    def _ranks(self) -> tuple[int, ...]:
        return tuple(rank for row in self.replicas for rank in row)

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Store this rank's rows of the value.

        The smoothing of LoRA products writes here. All other smoothing applies its edits in `part`.
        """
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                full = distribute_tensor(
                    full.to(parameter.dtype), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(full)

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Gather the shards of these rows on the owner only."""
        stored = parameter.detach()
        first, last = (0, len(stored)) if rows is None else (rows.start, rows.stop)
        if not isinstance(stored, DTensor) or Shard(0) not in stored.placements:
            whole = stored.to_local() if isinstance(stored, DTensor) else stored
            return whole[first:last] if owner == self.rank else None
        num_shards = len(self.replicas[0])
        if owner // num_shards != self.rank // num_shards:
            return None  # a different replica has the same rows
        size = -(-len(stored) // num_shards)  # as in torch.chunk: the last shards may be short
        piece, shard = stored.to_local(), owner % num_shards
        return to_owner(piece, (first, last), size, shard, self.group, piece.device)

    def local(self, stored: Tensor) -> Part:
        """Return this rank's rows."""
        if not isinstance(stored, DTensor):
            return Part(stored)
        _, offset = compute_local_shape_and_global_offset(
            stored.shape, stored.device_mesh, stored.placements
        )
        return Part(stored.to_local(), offset[0])

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Broadcast the tensor to all replicas."""
        dist.broadcast(tensor, self._ranks[owner])

    def total_(self, tensor: Tensor) -> None:
        """Add up over shards and average over replicas, so that all ranks get the same bits."""
        dist.all_reduce(tensor)
        if len(self.replicas) > 1:
            tensor /= len(self.replicas)


def gathered(tensor: Tensor) -> Tensor:
    """Return a plain tensor. A DTensor, such as FSDP2's gradient norm, is gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def split_mesh(name: str, parameter: DTensor) -> tuple[DeviceMesh, int] | None:
    """Return the device mesh, and its dimension that the parameter's rows are split over.

    The result is None if every rank holds the complete parameter.

    Raises:
        ConfigurationError: The parameter is not split in the way of FSDP2 and HSDP.
    """
    split = [i for i, placement in enumerate(parameter.placements) if placement != Replicate()]
    if not split:
        return None
    if len(split) > 1 or parameter.placements[split[0]] != Shard(0):
        raise ConfigurationError(
            f"{name} is split as {parameter.placements}; hf_pss supports FSDP2 and HSDP, "
            "which split the first dimension over one dimension of the device mesh. Leave tensor "
            "parallelism off, or exclude such matrices."
        )
    return parameter.device_mesh, split[0]


def _all_reduced(values: Tensor, divisor: int = 1) -> list[float]:
    total = values.double()
    dist.all_reduce(total)
    host: list[float] = (total / divisor).tolist()
    return host


def to_owner(
    piece: Tensor,
    wanted: tuple[int, int],
    size: int,
    owner: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor | None:
    """Concatenate what the ranks store of a range on the owner, and return None on other ranks.

    Only the range is transferred, and only the owner needs memory for all of it.

    Args:
        piece: What this rank stores. The pieces follow each other in the group's order.
        wanted: The first entry of the range, and the entry behind the last one.
        size: The length of each piece. The last ones may be short.
        owner: The owner's rank within the group.
        group: The group. All its ranks must make the call.
        device: The device of the result.
    """
    first, last = wanted
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ends = [max(first, min(last, size * number)) for number in range(world_size + 1)]
    lengths = [after - before for before, after in itertools.pairwise(ends)]
    at = ends[rank] - size * rank
    mine = piece[at : at + lengths[rank]].to(device).contiguous()
    sends = [len(mine) if other == owner else 0 for other in range(world_size)]
    receives = lengths if rank == owner else [0] * world_size
    collected = mine.new_empty(sum(receives), *mine.shape[1:])
    dist.all_to_all_single(collected, mine, receives, sends, group=group)
    return collected if rank == owner else None
