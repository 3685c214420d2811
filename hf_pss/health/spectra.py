"""All singular values of every selected matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import nn

from hf_pss.distributed import Backend
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.selection import MatrixView
from hf_pss.stacks import matrix_shapes, raise_together, read_turn, share_out

__all__ = ["measure_spectra"]


@torch.no_grad()
def measure_spectra(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, tuple[float, ...]]:
    """Return the singular values of each 2-D matrix by name, in descending order; NaN if broken.

    Cost: full, for sampled steps. Each matrix is decomposed by one rank, whose values go to all;
    one device-to-host read for the whole model.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.

    Raises:
        ElsewhereError: A decomposition has failed on another rank; there its error is raised.
    """
    lengths = {name: min(shape) for name, shape in matrix_shapes(views).items()}
    if not lengths:
        return {}
    device = next(iter(parameters.values())).device
    own = {name: torch.zeros(k, dtype=torch.float64, device=device) for name, k in lengths.items()}
    error: Exception | None = None
    for turn in share_out(views, parameters, backend.world_size):
        stack = read_turn(turn, parameters, backend)
        if stack is None or error is not None:
            continue
        try:
            scaled = unit_scaled(stack.matrices)
            values = scaled.restore(torch.linalg.svdvals(scaled.matrix))
        except Exception as caught:  # the others wait for this rank in the turns to come
            error = caught
            continue
        own |= dict(zip(stack.names, values.to(device, torch.float64), strict=True))
    flag = torch.tensor([float(error is not None)], dtype=torch.float64, device=device)
    has_failed, *told = backend.tell(torch.cat([flag, *own.values()]))
    if has_failed:
        raise_together(error)
    values_left = iter(told)
    return {name: tuple(islice(values_left, k)) for name, k in lengths.items()}
