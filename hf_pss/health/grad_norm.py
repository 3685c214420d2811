"""Gradient norms: one a parameter, to find where NaN began, and one a selected matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend, Part
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.selection import MatrixView
from hf_pss.stacks import Slot, matrix_names, matrix_slots

__all__ = ["GradientProbe", "measure_matrix_grad_norms"]


@dataclass(frozen=True, slots=True)
class GradientProbe:
    """Norm of each parameter's gradient, left on the device until somebody asks.

    Taken before clipping, since clipping by a NaN norm makes every gradient NaN and so hides the
    parameter where it began.
    """

    names: tuple[str, ...]
    norms: tuple[Tensor, ...]
    """Of what is kept here of each gradient."""

    @classmethod
    @torch.no_grad()
    def take(cls, named_parameters: Iterable[tuple[str, nn.Parameter]], backend: Backend) -> Self:
        """Measure the gradients that are there. Cost: one pass over them, nothing read back."""
        grads = {
            n: _here(p.grad, backend).tensor for n, p in named_parameters if p.grad is not None
        }
        return cls(tuple(grads), _norms(list(grads.values())))

    def nonfinite(self, backend: Backend) -> tuple[str, ...]:
        """Return the parameters, in the model's order, whose gradient holds NaN or inf; one read.

        On several ranks all must call.
        """
        if not self.norms:
            return ()
        device = self.norms[0].device
        flags = torch.stack([(~norm.isfinite()).double().to(device) for norm in self.norms])
        backend.total_(flags)
        return tuple(n for n, bad in zip(self.names, flags.tolist(), strict=True) if bad)


@torch.no_grad()
def measure_matrix_grad_norms(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    grad_norm_preclip: float,
    *,
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, float]:
    """Return the gradient norm of each 2-D matrix by name, as it was before clipping.

    Clipping and loss scaling multiply all gradients by one factor, so the norms found now are
    rescaled such that their total is the norm before clipping.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        grad_norm_preclip: The global norm before clipping, finite.
        groups: Parameters that count as one matrix, by its name.

    Returns:
        Names to norms; matrices without a gradient are left out.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    both = {name: own for name, own in groups.items() if all(n in grads for n in own)}
    if not held and not both:
        return {}
    parts = {name: _here(grad, backend) for name, grad in grads.items()}
    norms = [_norm(slot, parts[slot.view.parameter_name]) for slot in matrix_slots(held)]
    device = next(iter(parts.values())).tensor.device
    squares = torch.stack(
        [
            *(norm.to(device, torch.float64).square() for norm in norms),
            *(_total([parts[n].tensor for n in own], device) for own in both.values()),
            _total([part.tensor for part in parts.values()], device),
        ]
    )
    backend.total_(squares)
    *host, found = backend.agree(squares.sqrt())
    factor = grad_norm_preclip / found if found else 0.0
    return {name: n * factor for name, n in zip((*matrix_names(held), *both), host, strict=True)}


def _here(grad: Tensor, backend: Backend) -> Part:
    with backend.part(grad) as part:
        return part


def _norm(slot: Slot, part: Part) -> Tensor:
    piece = slot.view.piece(part.tensor, part.start, slot.expert)
    if piece is None:
        return part.tensor.new_zeros((), dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(part.tensor))
    return norm


def _norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the norm of each, never in a half dtype: fp16's largest number is 65,504."""
    if not tensors:
        return ()
    dtypes = {compute_dtype(tensor) for tensor in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(torch._foreach_norm(list(tensors), 2, dtype))


def _total(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the square of all their numbers' norm, float64, on that device."""
    norms = [norm.to(device, torch.float64) for norm in _norms(tensors)]
    return torch.stack(norms).square().sum()
