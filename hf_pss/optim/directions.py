"""Compute the directions of complete momenta, in stacks of equal shape and bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.models.distributed import ComputedTensor
from hf_pss.optim.layout import Layout, runs_of
from hf_pss.optim.update_rule import Options, Rule, State

# The largest number of elements in a stack. On a GPU it is large enough to keep the device busy. On
# a CPU batching does not speed up large matrices, so there a stack must fit into the cache.
_MAX_ELEMENTS = 2**26
_MAX_ELEMENTS_CPU = 2**20


@dataclass(frozen=True, slots=True)
class MomentumJob:
    """One parameter's momentum, its layout and its rule's state."""

    momentum: Tensor
    """The complete momentum, laid out like the parameter."""
    layout: Layout
    state: State
    """The rule's state for each part: ``name.0``, ``name.1``, …"""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some matrices of one part of a parameter."""

    key: int
    part: int
    momenta: Tensor
    target: Tensor
    """Shape (matrices, runs, rows, inputs). The momenta have runs and rows in one dimension."""
    state: State

    def __len__(self) -> int:
        return len(self.momenta)


def directions_of(
    jobs: Mapping[int, MomentumJob], rule: Rule, options: Options
) -> dict[int, ComputedTensor]:
    """Return the direction that the rule gives for each job, under the job's key.

    Args:
        jobs: Jobs of any shapes, all on one device.
        rule: The rule.
        options: The options of the parameter group.
    """
    directions = {key: torch.empty_like(job.momentum) for key, job in jobs.items()}
    new_states: dict[tuple[int, str], list[Tensor]] = {}
    for stack in _stacks(_slices(jobs, directions)):
        momenta = _joined([piece.momenta for piece in stack]).float()
        state = {name: _joined([s.state[name] for s in stack]) for name in stack[0].state}
        found, state = rule.direction(momenta, state, options)
        sizes = [len(piece) for piece in stack]
        for piece, direction in zip(stack, found.split_with_sizes(sizes), strict=True):
            piece.target.copy_(direction.reshape(piece.target.shape))
        for name, values in state.items():
            for piece, value in zip(stack, values.split_with_sizes(sizes), strict=True):
                new_states.setdefault((piece.key, f"{name}.{piece.part}"), []).append(value)
    states: dict[int, State] = {key: {} for key in jobs}
    for (key, name), pieces in new_states.items():
        # This is a copy, because a view would keep and save the memory of the whole stack.
        states[key][name] = torch.cat(pieces)
    return {key: ComputedTensor(directions[key], states[key]) for key in jobs}


def _slices(jobs: Mapping[int, MomentumJob], directions: Mapping[int, Tensor]) -> Iterator[_Slice]:
    for key, job in jobs.items():
        momenta, targets = (runs_of(t, job.layout) for t in (job.momentum, directions[key]))
        for part, (runs, target) in enumerate(zip(momenta, targets, strict=True)):
            momentum = runs.flatten(1, 2)  # a copy only if the rows lie within heads
            ending = f".{part}"
            state = {
                name.removesuffix(ending): value
                for name, value in job.state.items()
                if name.endswith(ending)
            }
            size = max(1, _limit(momentum) // momentum[0].numel())
            for first in range(0, len(momentum), size):
                here = slice(first, first + size)
                own = {name: value[here] for name, value in state.items()}
                yield _Slice(key, part, momentum[here], target[here], own)


def _stacks(slices: Iterable[_Slice]) -> Iterator[list[_Slice]]:
    by_shape: dict[object, list[_Slice]] = {}
    for piece in slices:
        stack = by_shape.setdefault((piece.momenta.shape[1:], frozenset(piece.state)), [])
        num_matrices = len(piece) + sum(len(other) for other in stack)
        if stack and num_matrices * piece.momenta[0].numel() > _limit(piece.momenta):
            yield stack.copy()
            stack.clear()
        stack.append(piece)
    yield from (stack for stack in by_shape.values() if stack)


def _limit(tensor: Tensor) -> int:
    return _MAX_ELEMENTS_CPU if tensor.is_cpu else _MAX_ELEMENTS


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
