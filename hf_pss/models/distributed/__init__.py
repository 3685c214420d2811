"""How parameters are stored over ranks. Only this package handles DDP, DTensor and ZeRO.

The other packages use a `Backend`. A backend reads complete parameters, or the part of a parameter
that this rank stores. It sends small results from the rank that computed them to all others, and
makes sure that all ranks make the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed.backend import Backend as Backend
from hf_pss.models.distributed.backend import Part as Part
from hf_pss.models.distributed.backend import Replicated as Replicated
from hf_pss.models.distributed.backend import Sharded as Sharded
from hf_pss.models.distributed.backend import gathered as gathered
from hf_pss.models.distributed.backend import reshard as reshard
from hf_pss.models.distributed.backend import split_mesh
from hf_pss.models.distributed.sharing import ComputedTensor as ComputedTensor
from hf_pss.models.distributed.sharing import Ranks as Ranks
from hf_pss.models.distributed.sharing import Replicas as Replicas
from hf_pss.models.distributed.sharing import Shards as Shards
from hf_pss.models.distributed.sharing import Sharing as Sharing
from hf_pss.models.distributed.sharing import local as local
from hf_pss.models.distributed.sharing import owners_of as owners_of
from hf_pss.models.distributed.sharing import shards_of as shards_of
from hf_pss.models.distributed.zero import Zero as Zero
from hf_pss.models.distributed.zero import is_zero


def backend_for(parameters: Mapping[str, Tensor]) -> Backend:
    """Return the backend that fits how these parameters are stored.

    Args:
        parameters: The model's parameters by name, as the training loop holds them.

    Raises:
        ConfigurationError: The parameters are split in a way that hf_pss does not support (FSDP1,
            tensor parallelism).
    """
    if not dist.is_available() or not dist.is_initialized():
        return Backend()
    layouts, group = set(), None
    for name, parameter in parameters.items():
        # FSDP1 marks flattened parameters, even if it exposes the original ones.
        if isinstance(parameter, FlatParameter) or hasattr(parameter, "_fsdp_flattened"):
            raise ConfigurationError(
                f"{name} belongs to FSDP1, which flattens matrices; use FSDP2 "
                "(fsdp_config: {version: 2})."
            )
        if isinstance(parameter, DTensor) and (found := split_mesh(name, parameter)):
            mesh, dimension = found
            # Two meshes over the same ranks have different groups, so compare the ranks.
            ranks = mesh.mesh.movedim(dimension, -1).reshape(-1, mesh.size(dimension)).tolist()
            layouts.add(tuple(map(tuple, ranks)))
            group = group or mesh.get_group(dimension)
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
    return Replicated() if dist.get_world_size() > 1 else Backend()
