"""Division of work on a list of tensors over ranks. A single process does all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_pss.models.distributed.backend import split_mesh

Ranks: TypeAlias = dist.ProcessGroup
"""The ranks that a parameter is split over."""


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """The result of the work on one tensor, and the state to keep for the next step."""

    tensor: Tensor
    """A tensor with the shape of the given one. It is complete, or holds this rank's rows."""
    state: dict[str, Tensor]
    """The state. It is small, and all ranks store it."""


Compute: TypeAlias = Callable[[Mapping[int, Tensor]], dict[int, ComputedTensor]]
"""Maps complete tensors, by their place in the list of parameters, to their results."""


class Sharing:
    """Divides work over ranks. This class: one process, which does all of it.

    There is one tensor for each parameter, laid out like it.
    """

    @property
    def num_shares(self) -> int:
        """The number of ranks that a tensor's rows are spread over. 1 if each rank has all rows."""
        return 1

    def compute(
        self, params: Sequence[Tensor], tensors: Sequence[Tensor], compute: Compute
    ) -> list[ComputedTensor]:
        """Return the results of all tensors: this rank's rows of each tensor, and complete states.

        This is collective. Every rank has the same parameters in the same order.

        Args:
            params: The parameters. They are DTensors if they are sharded.
            tensors: This rank's rows of each tensor.
            compute: A function that is called once, with the tensors that this rank owns.
        """
        found = compute(dict(enumerate(tensors)))
        return [found[i] for i in range(len(params))]


class Replicas(Sharing):
    """DDP: every rank has every tensor, computes its share and sends it to the others.

    All ranks apply the result of the same rank, so replicas stay equal bit for bit.
    """

    def __init__(self, group: Ranks | None = None) -> None:
        self._group = group
        self._shapes: dict[int, dict[str, torch.Size]] = {}

    def compute(
        self, params: Sequence[Tensor], tensors: Sequence[Tensor], compute: Compute
    ) -> list[ComputedTensor]:
        """Compute this rank's share, and gather the shares of the other ranks."""
        owners = _owners(params, dist.get_world_size(self._group))
        rank = dist.get_rank(self._group)
        found = compute({i: m for i, m in enumerate(tensors) if owners[i] == rank})
        flat = [found[i].tensor.flatten() for i in range(len(params)) if owners[i] == rank]
        sizes = [m.numel() for m in tensors]
        gathered = _all_gather(_joined(flat, tensors), owners, sizes, self._group)
        answers = [values.view_as(m) for values, m in zip(gathered, tensors, strict=True)]
        states = self._gathered_states(params, found, owners, tensors[0])
        return [ComputedTensor(d, s) for d, s in zip(answers, states, strict=True)]

    def _gathered_states(
        self,
        params: Sequence[Tensor],
        found: Mapping[int, ComputedTensor],
        owners: Sequence[int],
        like: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Return the states of all parameters, given the states that this rank computed.

        Every rank stores all states, so that any rank can save them and a run can resume
        with different owners.
        """
        if any(id(p) not in self._shapes for p in params):
            self._learn_shapes(params, found)
        shapes = [self._shapes[id(p)] for p in params]
        sizes = [sum(map(prod, own.values())) for own in shapes]
        if not any(sizes):
            return [{} for _ in params]
        flat = [found[i].state[name].flatten().float() for i in sorted(found) for name in shapes[i]]
        values = _all_gather(_joined(flat, [like.float()]), owners, sizes, self._group)
        return [_unpacked(value, own) for value, own in zip(values, shapes, strict=True)]

    def _learn_shapes(self, params: Sequence[Tensor], found: Mapping[int, ComputedTensor]) -> None:
        """Exchange the shapes of each state once, because at first only the owner has them."""
        mine = {i: {n: tuple(v.shape) for n, v in m.state.items()} for i, m in found.items()}
        every: list[dict[int, dict[str, tuple[int, ...]]] | None]
        every = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(every, mine, group=self._group)
        for theirs in every:
            for i, shapes in (theirs or {}).items():
                self._shapes[id(params[i])] = {n: torch.Size(s) for n, s in shapes.items()}


class Shards(Replicas):
    """FSDP2 and HSDP: one rank gathers a tensor, computes, and sends each rank its rows.

    Each step needs two all-to-alls. Each transfers as many bytes of the
    tensors as this rank stores.
    """

    @property
    def num_shares(self) -> int:
        """The number of ranks."""
        return dist.get_world_size(self._group)

    def compute(
        self, params: Sequence[Tensor], tensors: Sequence[Tensor], compute: Compute
    ) -> list[ComputedTensor]:
        """Gather the tensors, compute, and send the results back."""
        rank, world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        owners = _owners(params, world_size)
        places = [[i for i, owner in enumerate(owners) if owner == r] for r in range(world_size)]
        mine = places[rank]

        def part(place: int, holder: int) -> slice:
            rows = -(-params[place].shape[0] // world_size)  # as in torch.chunk
            return slice(holder * rows, (holder + 1) * rows)

        def count(place: int, holder: int) -> int:
            shape = params[place].shape
            return len(range(*part(place, holder).indices(shape[0]))) * prod(shape[1:])

        received = self._exchange(
            [[tensors[i].flatten() for i in theirs] for theirs in places],
            [[count(i, r) for i in mine] for r in range(world_size)],
            like=tensors[0],
        )
        whole = {
            place: torch.cat([pieces[n] for pieces in received]).view(params[place].shape)
            for n, place in enumerate(mine)
        }
        found = compute(whole)
        returned = self._exchange(
            [[found[i].tensor[part(i, r)].flatten() for i in mine] for r in range(world_size)],
            [[tensors[i].numel() for i in theirs] for theirs in places],
            like=tensors[0],
        )
        answers = {
            place: values.view_as(tensors[place])
            for theirs, pieces in zip(places, returned, strict=True)
            for place, values in zip(theirs, pieces, strict=True)
        }
        states = self._gathered_states(params, found, owners, tensors[0])
        return [ComputedTensor(answers[i], state) for i, state in enumerate(states)]

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], *, like: Tensor
    ) -> list[list[Tensor]]:
        """Send flat tensors to each rank. Return the received ones, which have these sizes."""
        sent = _joined([tensor for theirs in outgoing for tensor in theirs], [like])
        totals = [sum(theirs) for theirs in sizes]
        received = like.new_empty(sum(totals))
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=totals,
            input_split_sizes=[sum(t.numel() for t in theirs) for theirs in outgoing],
            group=self._group,
        )
        return [
            list(chunk.split_with_sizes(list(theirs)))
            for chunk, theirs in zip(received.split_with_sizes(totals), sizes, strict=True)
        ]


def _owners(params: Sequence[Tensor], world_size: int) -> list[int]:
    return owners_of([prod(p.shape) * min(p.shape[-2:]) for p in params], world_size)


def owners_of(costs: Sequence[int], world_size: int) -> list[int]:
    """Return the owner of each task. The most expensive task goes to the rank with the least work.

    Every rank computes the same list. Tasks of equal cost keep their order.
    """
    loads, owners = [0] * world_size, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = loads.index(min(loads))
        owners[place] = owner
        loads[owner] += costs[place]
    return owners


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards_of(parameter: Tensor) -> Ranks | None:
    """Return the ranks that a parameter is split over, or None if each rank has all of it.

    Raises:
        ConfigurationError: The parameter is not split in the way of FSDP2 and HSDP.
    """
    found = split_mesh("A parameter", parameter) if isinstance(parameter, DTensor) else None
    if found is None:
        return None
    mesh, dimension = found
    group: Ranks = mesh.get_group(dimension)
    return group


def _unpacked(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    pieces = flat.split_with_sizes([prod(shape) for shape in shapes.values()])
    named = zip(shapes.items(), pieces, strict=True)
    # This is a copy, because a view would keep and save the whole gathered buffer.
    return {name: piece.view(shape).clone() for (name, shape), piece in named}


def _joined(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if tensors else like[0].new_empty(0)


def _all_gather(
    mine: Tensor, owners: Sequence[int], sizes: Sequence[int], group: Ranks | None
) -> list[Tensor]:
    """Return the owners' tensors, in the parameters' order, from the flat buffer of each owner."""
    world_size = dist.get_world_size(group)
    totals = [
        sum(size for size, o in zip(sizes, owners, strict=True) if o == r)
        for r in range(world_size)
    ]
    longest = max(totals)
    padded = mine.new_zeros(longest)
    padded[: mine.numel()] = mine
    everything = mine.new_empty(world_size * longest)
    dist.all_gather_into_tensor(everything, padded, group=group)
    places = [r * longest for r in range(world_size)]
    found = []
    for size, owner in zip(sizes, owners, strict=True):
        found.append(everything[places[owner] : places[owner] + size])
        places[owner] += size
    return found
