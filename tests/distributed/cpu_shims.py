"""Let Accelerate's real FSDP2 and DeepSpeed paths run on a CPU with gloo.

Called before a Trainer is made; process-wide, and for these tests only: Accelerate takes both paths
on accelerators alone.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable_fsdp2_on_cpu() -> None:
    """Accelerate switches to FSDP only from MULTI_<accelerator>."""
    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        wanted = kwargs.get("fsdp_plugin") is not None or _is_on("ACCELERATE_USE_FSDP")
        shared = PartialState._shared_state
        if wanted and shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = patched


def enable_deepspeed_on_cpu() -> None:
    """Without an accelerator it finds no backend for DeepSpeed, and takes every rank for one.

    DeepSpeed's own shared-memory collectives, a C++ extension built at first use, give way to gloo.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    original = PartialState._prepare_backend

    def patched(
        self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> Any:
        found, kind = original(self, cpu, sagemaker_dp, backend)
        if found is None and "LOCAL_RANK" in os.environ and _is_on("ACCELERATE_USE_DEEPSPEED"):
            return "gloo", DistributedType.MULTI_CPU
        return found, kind

    PartialState._prepare_backend = patched


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
