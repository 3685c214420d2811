"""FSDP2 and HSDP: parameters are DTensors, split along their first dimension."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed.backend import ManyRanks, Part, to_owner


def gathered(tensor: Tensor) -> Tensor:
    """Return a plain tensor. A DTensor, such as FSDP2's gradient norm, is gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_group(name: str, parameter: DTensor) -> dist.ProcessGroup | None:
    """Return the ranks that a parameter is split over, or None if every rank holds all of it.

    Raises:
        ConfigurationError: The parameter is not split in the way of FSDP2 and HSDP.
    """
    dimension = _split_dimension(name, parameter)
    if dimension is None:
        return None
    group: dist.ProcessGroup = parameter.device_mesh.get_group(dimension)
    return group


def shard_ranks(name: str, parameter: DTensor) -> tuple[tuple[int, ...], ...]:
    """Return the global ranks that a parameter is split over, with one row for each replica.

    The result is empty if every rank holds the complete parameter.

    Raises:
        ConfigurationError: As in `shard_group`.
    """
    dimension = _split_dimension(name, parameter)
    if dimension is None:
        return ()
    mesh = parameter.device_mesh
    ranks = mesh.mesh.movedim(dimension, -1).reshape(-1, mesh.size(dimension))
    return tuple(map(tuple, ranks.tolist()))


def _split_dimension(name: str, parameter: DTensor) -> int | None:
    """Return the dimension of the device mesh that the parameter's rows are split over."""
    split = [i for i, placement in enumerate(parameter.placements) if placement != Replicate()]
    if not split:
        return None
    if len(split) > 1 or parameter.placements[split[0]] != Shard(0):
        raise ConfigurationError(
            f"{name} is split as {parameter.placements}; hf_pss supports FSDP2 and HSDP, "
            "which split the first dimension over one dimension of the device mesh. Leave tensor "
            "parallelism off, or exclude such matrices."
        )
    return split[0]


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

    def full(self, parameter: Tensor) -> Tensor:
        """Gather the parameter on every rank."""
        return gathered(parameter.detach())

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of this rank's rows."""
        return self.local(parameter.detach()).tensor.clone()

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Copy the rows back."""
        self.local(parameter.detach()).tensor.copy_(kept)

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Store this rank's rows of the value."""
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
        ends = [max(first, min(last, size * shard)) for shard in range(num_shards + 1)]
        lengths = [after - before for before, after in itertools.pairwise(ends)]
        shard = self.rank % num_shards
        at = ends[shard] - size * shard
        return to_owner(
            stored.to_local()[at : at + lengths[shard]], lengths, owner % num_shards, self.group
        )

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
