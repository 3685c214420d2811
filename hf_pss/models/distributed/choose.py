"""Choose the backend of a model from the type of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed.backend import Backend, OneProcess, Replicated
from hf_pss.models.distributed.sharded import Sharded, shard_group, shard_ranks
from hf_pss.models.distributed.zero import Zero, is_zero


def backend_for(parameters: Mapping[str, Tensor]) -> Backend:
    """Return the backend that fits how these parameters are stored.

    Args:
        parameters: The model's parameters by name, as the training loop holds them.

    Raises:
        ConfigurationError: The parameters are split in a way that hf_pss does not support (FSDP1,
            tensor parallelism).
    """
    if not dist.is_available() or not dist.is_initialized():
        return OneProcess()
    layouts, group = set(), None
    for name, parameter in parameters.items():
        # FSDP1 marks flattened parameters, even if it exposes the original ones.
        if isinstance(parameter, FlatParameter) or hasattr(parameter, "_fsdp_flattened"):
            raise ConfigurationError(
                f"{name} belongs to FSDP1, which flattens matrices; use FSDP2 "
                "(fsdp_config: {version: 2})."
            )
        if isinstance(parameter, DTensor):
            # Two meshes over the same ranks have different groups, so compare the ranks.
            layouts.add(shard_ranks(name, parameter))
            group = group or shard_group(name, parameter)
    layouts.discard(())
    if len(layouts) > 1:
        raise ConfigurationError(
            "The model's parameters are split over different groups of ranks; hf_pss can "
            "divide its work over only one group. Shard all parameters over the same device mesh."
        )
    if group is not None:
        (replicas,) = layouts
        if sum(map(len, replicas)) != dist.get_world_size():
            raise ConfigurationError(
                f"The model's parameters are split over {sum(map(len, replicas))} of "
                f"{dist.get_world_size()} ranks, but hf_pss needs all ranks. "
                "Leave pipeline parallelism off."
            )
        return Sharded(replicas, group)
    if any(is_zero(parameter) for parameter in parameters.values()):
        return Zero()
    return Replicated() if dist.get_world_size() > 1 else OneProcess()
