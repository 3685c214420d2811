"""Where parameters live: the one file that may know DDP, DTensor and ZeRO; today, whole weights.

Layer 3 sees a `Backend` and asks it for the whole of a parameter, to put a changed one back, to
bring device numbers to the host so that every rank decides the same, and whether there are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from hf_pss.errors import ConfigurationError

__all__ = ["Backend", "OneProcess", "Replicated", "backend_for"]


class Backend(Protocol):
    """What smoothing must know of how a model is spread over devices and ranks."""

    @property
    def is_shared(self) -> bool:
        """Whether several ranks train the model together."""

    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter, detached; writing into it need not reach the model."""

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Make ``full`` the value of the parameter everywhere it is kept."""

    def agree(self, values: Tensor) -> list[float]:
        """Return device numbers, shape (k,), as host floats that are the same on every rank."""


@dataclass(frozen=True, slots=True)
class OneProcess:
    """The identity: every parameter is whole and here, and there is nobody to agree with."""

    is_shared: ClassVar[bool] = False

    def full(self, parameter: Tensor) -> Tensor:
        """Return the parameter itself, detached: the same memory."""
        return parameter.detach()

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Copy ``full`` into the parameter, unless it is the parameter's own memory."""
        if full.data_ptr() != parameter.data_ptr():
            with torch.no_grad():
                parameter.copy_(full)

    def agree(self, values: Tensor) -> list[float]:
        """Return the numbers. This is the step's one device-to-host read."""
        host: list[float] = values.tolist()
        return host


@dataclass(frozen=True, slots=True)
class Replicated(OneProcess):
    """DDP: every rank holds every parameter and smooths its own replica, all of them alike.

    Gradients and weights are bit-identical on all ranks, losses are not: a NaN on one rank must not
    make that rank alone skip an update. Replicas stay equal where the ranks' devices compute alike;
    mixed devices are not catered for.
    """

    is_shared: ClassVar[bool] = True

    def agree(self, values: Tensor) -> list[float]:
        """Return the mean over ranks, so that NaN on one is NaN on all; every rank must call.

        In float64 the mean of equal float32 numbers is that number, bit for bit.
        """
        total = values.double()
        torch.distributed.all_reduce(total)
        host: list[float] = (total / torch.distributed.get_world_size()).tolist()
        return host


def backend_for(parameters: Mapping[str, nn.Parameter]) -> Backend:
    """Return the backend that fits how these parameters are stored.

    Args:
        parameters: The model's parameters by name, as the training loop holds them.

    Raises:
        ConfigurationError: They are sharded (FSDP, tensor parallelism, ZeRO): not supported yet.
    """
    for name, parameter in parameters.items():
        if sharding := _sharding_of(parameter):
            raise ConfigurationError(
                f"{name} belongs to {sharding}; this release smooths whole weights only. Train on "
                "one process or under DDP."
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            return Replicated()
    return OneProcess()


def _sharding_of(parameter: nn.Parameter) -> str | None:
    if isinstance(parameter, DTensor):
        return "FSDP2 or tensor parallelism (it is a DTensor)"
    # FSDP1 marks what it has flattened, also where it shows the original parameters.
    if isinstance(parameter, FlatParameter) or hasattr(parameter, "_fsdp_flattened"):
        return "FSDP1"
    # DeepSpeed marks its parameters: `ds_id` under ZeRO-3, `_hp_mapping` under ZeRO-1 and 2, where
    # the fp32 master would undo whatever is written into the parameter alone.
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return "DeepSpeed ZeRO"
    return None
