"""Tiny losses with a dense Hessian in float64 to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Loss]:
    """Return a tanh network of 47 parameters, and its mean square error on sixteen rows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 1))
    x, y = torch.randn(16, 4).to(dtype), torch.randn(16, 1).to(dtype)
    model = model.to(dtype)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def dense_hessian(model: nn.Module, loss: Loss) -> Tensor:
    """Return H (n, n) by torch.autograd.functional.hessian, parameters joined in order."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def flat_loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {n: part.view(shapes[n]) for n, part in zip(shapes, parts, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(model, named):
            return loss()

    return torch.autograd.functional.hessian(flat_loss, start)


def quadratic(matrix: Tensor) -> tuple[dict[str, Tensor], Loss]:
    """Return one parameter w = 0 and the loss wᵀAw/2, whose Hessian is A."""
    w = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))
    return {"w": w}, lambda: 0.5 * (w @ matrix @ w)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return ((q * eigenvalues.double()) @ q.mT).to(eigenvalues)
