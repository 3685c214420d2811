"""Whether what would be saved is finite: found out on the device, one read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["first_nonfinite"]


@torch.no_grad()
def first_nonfinite(model: nn.Module, optimizer: Any = None) -> str | None:
    """Return the name of the first tensor that holds NaN or inf; None where all are finite.

    Trained weights and the optimizer's state must be finite. Buffers that are saved may hold inf,
    as masks do, but no NaN. Frozen weights are as they were loaded and are not read.

    Cost: one read of weights and state by the device, one of a bool each by the host.

    Args:
        model: What is trained; of a sharded one, what this rank keeps.
        optimizer: Wrapped or not; None where its state is not saved.
    """
    named = list(_tensors(model, optimizer))
    if not named:
        return None
    device = named[0][1].device
    largest = torch.stack([_largest(tensor).to(device) for _, tensor, _ in named])
    may_be_inf = torch.tensor([may for _, _, may in named], device=device)
    is_bad = largest.isnan() | (largest.isinf() & ~may_be_inf)
    flags = is_bad.tolist()
    return next((name for (name, _, _), bad in zip(named, flags, strict=True) if bad), None)


def _largest(tensor: Tensor) -> Tensor:
    """Return max |x| as float32; NaN where there is one. No copy of the tensor is made."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    largest: Tensor = torch.linalg.vector_norm(tensor, torch.inf).float()
    return largest


def _tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield names, tensors, and whether these may hold inf."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        if parameter.requires_grad:
            # DeepSpeed ZeRO-3 leaves an empty shell and keeps its share here.
            yield from _readable(name, getattr(parameter, "ds_tensor", parameter), may_be_inf=False)
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield from _readable(f"{prefix}.{name}".lstrip("."), buffer, may_be_inf=True)
    for parameter, state in _state_of(optimizer).items():
        owner = names.get(id(parameter), "a parameter")
        for name, value in state.items():
            # Those without a dimension are counters.
            if isinstance(value, Tensor) and value.dim() > 0:
                yield from _readable(f"{name} of {owner}", value, may_be_inf=False)


def _state_of(optimizer: Any) -> dict[Any, dict[str, Any]]:
    """Return the state of the innermost optimizer: Accelerate's and DeepSpeed's wrap it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    state: dict[Any, dict[str, Any]] = getattr(optimizer, "state", {})
    return {key: value for key, value in state.items() if isinstance(value, dict)}


def _readable(name: str, tensor: Any, *, may_be_inf: bool) -> Iterator[tuple[str, Tensor, bool]]:
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor: no collective, this rank's own
    # Eight-bit floats are quantised storage, which nothing trains directly.
    if local.is_floating_point() and local.element_size() > 1:
        yield name, local.detach(), may_be_inf
