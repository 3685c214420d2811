"""Gradient norms: one a parameter, to find where NaN began, and one a selected matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend
from hf_pss.selection import MatrixView
from hf_pss.stacks import matrix_names

__all__ = ["GradientProbe", "measure_matrix_grad_norms"]


@dataclass(frozen=True, slots=True)
class GradientProbe:
    """Norm of each parameter's gradient, left on the device until somebody asks.

    Taken before clipping, since clipping by a NaN norm makes every gradient NaN and so hides the
    parameter where it began.
    """

    names: tuple[str, ...]
    norms: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def take(cls, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Self:
        """Measure the gradients that are there. Cost: one pass over them, nothing read back."""
        grads = {name: p.grad for name, p in named_parameters if p.grad is not None}
        return cls(tuple(grads), tuple(torch._foreach_norm(list(grads.values()))) if grads else ())

    def nothing_is_finite(self) -> bool:
        """Tell whether every gradient holds NaN or inf."""
        return not any(bool(norm.isfinite()) for norm in self.norms)

    def first_nonfinite(self, limit: int = 3) -> tuple[str, ...]:
        """Return the first parameters, in the model's order, whose gradient holds NaN or inf."""
        bad = (n for n, v in zip(self.names, self.norms, strict=True) if not v.isfinite())
        return tuple(name for name, _ in zip(bad, range(limit), strict=False))


@torch.no_grad()
def measure_matrix_grad_norms(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    grad_norm_preclip: float,
) -> dict[str, float]:
    """Return the gradient norm of each 2-D matrix by name, as it was before clipping.

    Clipping and loss scaling multiply all gradients by one factor, so the norms found now are
    rescaled such that their total is the norm before clipping.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        grad_norm_preclip: The global norm before clipping, finite.

    Returns:
        Names to norms; matrices without a gradient are left out.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    if not held:
        return {}
    norms = [_norms(view.read(backend.full(grads[view.parameter_name]))) for view in held]
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads.values()))))
    *host, found = backend.agree(torch.cat([*norms, total.reshape(1)]))
    factor = grad_norm_preclip / found if found else 0.0
    return {name: n * factor for name, n in zip(matrix_names(held), host, strict=True)}


def _norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float32)
    return norms.reshape(-1)
