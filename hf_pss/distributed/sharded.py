"""FSDP2 and HSDP: parameters are DTensors, split along their first dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from hf_pss.distributed.backend import Part, mean_over_ranks, moment_of
from hf_pss.errors import ConfigurationError

__all__ = ["Sharded", "gathered", "shard_group"]


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain one: a DTensor, such as FSDP2's gradient norm, is made whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_group(name: str, parameter: DTensor) -> dist.ProcessGroup | None:
    """Return the ranks that a parameter is split over; None where it is replicated everywhere.

    Raises:
        ConfigurationError: It is split in another way than FSDP2 and HSDP do.
    """
    split = [i for i, placement in enumerate(parameter.placements) if placement != Replicate()]
    if not split:
        return None
    if len(split) > 1 or parameter.placements[split[0]] != Shard(0):
        raise ConfigurationError(
            f"{name} is split as {parameter.placements}; hf_pss knows FSDP2 and HSDP, which split "
            "the first dimension over one dimension of the device mesh. Leave tensor parallelism "
            "off, or exclude such matrices."
        )
    group: dist.ProcessGroup = parameter.device_mesh.get_group(split[0])
    return group


@dataclass(frozen=True, slots=True)
class Sharded:
    """Every rank keeps some rows of each parameter; a whole matrix is seen by its owner only.

    Under HSDP each replica group does the same work on the same numbers. FSDP2 shows plain tensors
    in place of shards for a while after an evaluation; all of this is used after an update, when
    they are shards again, and each tensor is asked what it is.
    """

    group: dist.ProcessGroup
    is_shared: ClassVar[bool] = True
    can_hold_back: ClassVar[bool] = True

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def rank(self) -> int:
        """The rank within the group that parameters are split over."""
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """How many ranks a parameter is split over."""
        return dist.get_world_size(self.group)

    def full(self, parameter: Tensor) -> Tensor:
        """Gather the parameter on every rank."""
        return gathered(parameter.detach())

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Keep this rank's rows."""
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                full = distribute_tensor(
                    full.to(parameter.dtype), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(full)

    def collect(self, parameter: Tensor, owner: int) -> Tensor | None:
        """Gather the shards at the owner only."""
        whole = parameter.detach()
        if not isinstance(whole, DTensor):
            return whole if owner == self.rank else None
        local, num_rows = whole.to_local(), whole.shape[0]
        if Shard(0) not in whole.placements:
            return local if owner == self.rank else None
        rows = -(-num_rows // self.world_size)  # as torch.chunk: the last shards may be short
        if len(local) < rows:
            short = local
            local = short.new_zeros(rows, *short.shape[1:])
            local[: len(short)] = short
        if owner != self.rank:
            dist.gather(local.contiguous(), None, self._global(owner), group=self.group)
            return None
        gathered_rows = local.new_empty(rows * self.world_size, *local.shape[1:])
        shards = list(gathered_rows.chunk(self.world_size))
        dist.gather(local.contiguous(), shards, self._global(owner), group=self.group)
        return gathered_rows[:num_rows]

    @contextmanager
    def part(self, parameter: Tensor) -> Iterator[Part]:
        """Give this rank's rows."""
        yield _part(parameter.detach())

    @contextmanager
    def moment_part(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> Iterator[Part | None]:
        """Give this rank's rows of the moment."""
        moment = moment_of(optimizer, parameter, names)
        yield _part(moment) if moment is not None else None

    def send_(self, tensor: Tensor, owner: int) -> None:
        """Broadcast within the group."""
        dist.broadcast(tensor, self._global(owner), group=self.group)

    def total_(self, tensor: Tensor) -> None:
        """Add up over the group."""
        dist.all_reduce(tensor, group=self.group)

    def tell(self, values: Tensor) -> list[float]:
        """Add up over the group: each number is one rank's, and 0 on all others."""
        known = values.double()
        dist.all_reduce(known, group=self.group)
        host: list[float] = known.tolist()
        return host

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def agree(self, values: Tensor) -> list[float]:
        """Return the mean over all ranks of the run, see `Replicated.agree`."""
        return mean_over_ranks(values)


def _part(tensor: Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(tensor)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Part(tensor.to_local(), offset[0])
