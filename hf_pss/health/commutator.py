"""Size of the commutator of the Hessian and Adam's preconditioner, on sampled directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError

__all__ = ["commutator_size"]


def commutator_size(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    denominator: Sequence[Tensor],
    *,
    num_directions: int = 1,
    seed: int = 0,
) -> Tensor:
    """Return √(mean ‖[H, M]z‖²), z random signs over √n, M = diag(1/d): ≈ ‖[H, M]‖_F/√n.

    The commutator is what makes Adam's update operator non-normal (arXiv 2605.23476); sampling its
    Frobenius norm by Hutchinson's directions is ours. 0 where M is a multiple of the identity.

    Cost: full. Two Hessian–vector products a direction; nothing is read back.

    Args:
        product: Hz for z given as tensors of the parameters' shapes.
        denominator: d = √v̂ + ε by parameter.
        num_directions: At least 1; the error falls with its root.
        seed: Of the directions; the global random state is not touched.

    Returns:
        Scalar, in the units of H/d; NaN where something is not finite.

    Raises:
        ConfigurationError: Fewer than one direction, or no parameter.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> d = torch.tensor([1.0, 2.0])
    >>> round(commutator_size(lambda z: [h @ z[0]], [d]).item(), 6)  # [H, M] = ±½ off the diagonal
    0.5
    """
    if num_directions < 1 or not denominator:
        raise ConfigurationError(
            f"You gave num_directions={num_directions} and {len(denominator)} parameters; give at "
            "least one of each."
        )
    generator = torch.Generator().manual_seed(seed)
    num_weights = sum(d.numel() for d in denominator)
    total = denominator[0].new_zeros(())
    for _ in range(num_directions):
        z = [
            (torch.randint(0, 2, d.shape, generator=generator) * 2 - 1).to(d) / num_weights**0.5
            for d in denominator
        ]
        after = product([a / d for a, d in zip(z, denominator, strict=True)])
        before = [b / d for b, d in zip(product(z), denominator, strict=True)]
        for a, b in zip(after, before, strict=True):
            total = total + (a - b).square().sum().to(total)
    return (total / num_directions).sqrt()
