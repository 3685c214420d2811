"""Scale matrices to unit size, exactly, so that squares neither overflow nor vanish."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError, NonFiniteError

# Both 2^e and 2^-e must be normal fp32 numbers, because denormals may be flushed to zero.
_MAX_EXPONENT = 126


@dataclass(frozen=True, slots=True)
class UnitScaled:
    """Matrices divided by a power of two, without rounding. Non-finite matrices become zero."""

    matrix: Tensor
    """(..., m, n), float32 or float64. The largest magnitude of each matrix is in [0.5, 1). At the
    ends of the exponent range it is as close as a normal scale allows."""
    scale: Tensor
    """(...), a power of two: ``weight = matrix * scale``."""
    finite: Tensor
    """(...) bool. It is False if the matrix holds NaN or inf."""

    def restore(self, values: Tensor) -> Tensor:
        """Return results for the scaled matrices, (...) or (..., K), in the original units."""
        extra = (1,) * (values.ndim - self.scale.ndim)
        shape = (*self.scale.shape, *extra)
        nan = torch.nan  # the result of a non-finite matrix
        return torch.where(self.finite.view(shape), values * self.scale.view(shape), nan)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return float64 for float64, and float32 for every narrower floating type."""
    if not weight.is_floating_point():
        raise ConfigurationError(
            f"You gave a matrix of {weight.dtype}; singular values can only be computed for "
            "real floating types. Convert it first, for instance with .float()."
        )
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def require_matrix(weight: Tensor) -> None:
    """Raise `ConfigurationError` if there are fewer than two dimensions, no rows or no columns."""
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ConfigurationError(
            f"You gave a tensor of shape {tuple(weight.shape)}; a weight matrix has shape "
            "(..., m, n) with m, n >= 1. Pass the 2-D view of the parameter."
        )


def unit_scaled(weight: Tensor) -> UnitScaled:
    """Divide each matrix by the power of two just above its largest magnitude.

    Args:
        weight: (..., m, n), any real floating dtype. The batch shape may be anything, even empty.

    Raises:
        ConfigurationError: The tensor has fewer than two dimensions, no rows, no columns, or a
            dtype that is not floating.
    """
    require_matrix(weight)
    matrix = weight.detach().to(compute_dtype(weight))
    # On a CPU this is three times as fast as the maximum of abs(), and needs no memory.
    largest = torch.maximum(matrix.amax(dim=(-2, -1)), -matrix.amin(dim=(-2, -1)))
    finite = largest.isfinite()
    exponent = torch.frexp(torch.where(finite, largest, 1.0)).exponent
    exponent = exponent.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    one = torch.ones_like(largest)
    inverse = torch.ldexp(one, -exponent)[..., None, None]
    return UnitScaled(
        matrix=(matrix * inverse).masked_fill_(~finite[..., None, None], 0.0),
        scale=torch.ldexp(one, exponent),
        finite=finite,
    )


def require_finite(scaled: UnitScaled) -> None:
    """Raise a `NonFiniteError` that names the bad matrices. This makes one device-to-host read."""
    if bool(scaled.finite.all()):
        return
    bad = (~scaled.finite).nonzero().tolist()
    where = "It" if scaled.finite.ndim == 0 else f"Of the batch, {len(bad)} (first at {bad[0]})"
    raise NonFiniteError(
        f"You gave a matrix to decompose that is not finite. {where} holds NaN or inf. "
        "Check with torch.isfinite first, and leave such a matrix out."
    )
