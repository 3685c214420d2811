"""An armed meter of a model, and its hooks."""

from __future__ import annotations

from torch import Tensor, nn

from hf_pss.health.meter import RepresentationMeter
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.tracked import SpectrumTracker


def hooks_of(model: nn.Module) -> int:
    return sum(
        "ForwardHooks" in hook.__qualname__
        for module in model.modules()
        for held in (module._forward_hooks, module._forward_pre_hooks)
        for hook in held.values()
    )


def armed(model: nn.Module) -> tuple[RepresentationMeter, dict[str, Tensor]]:
    selection, parameters = select_matrices(model), named_parameters_canonical(model)
    tracker = SpectrumTracker(selection.matrices, Backend())
    tracker.refresh(parameters)
    directions = tracker.directions(parameters)
    meter = RepresentationMeter(model, selection, Backend())
    meter.arm(directions)
    return meter, directions
