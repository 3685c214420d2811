"""Refuse a Trainer whose backend PSS does not support.

`hf_pss.models.distributed.backend_for` refuses the parameters of such a backend in your own loop.
"""

from __future__ import annotations

from accelerate.utils import DistributedType
from transformers import Trainer

from hf_pss.errors import ConfigurationError


def refuse_backends(trainer: Trainer) -> None:
    """Raise an error for a backend whose weights PSS cannot read or write.

    Raises:
        ConfigurationError: The trainer runs under FSDP1, Megatron-LM, or DeepSpeed without ZeRO.
    """
    kind = trainer.accelerator.distributed_type
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_fsdp1 = kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 2) == 1
    if is_fsdp1 or kind == DistributedType.MEGATRON_LM:
        raise ConfigurationError(
            f"This trainer runs under {'FSDP1' if is_fsdp1 else kind.value}, which flattens weight "
            "matrices. Use DDP, FSDP2 (fsdp_config: {version: 2}) or DeepSpeed ZeRO."
        )
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 0:
        raise ConfigurationError(
            "This trainer runs under DeepSpeed with ZeRO stage 0, where PSS cannot reach the "
            "weights that the optimizer updates. Use stage 1, 2 or 3, or DDP."
        )
