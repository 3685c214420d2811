"""The polar factor UVᵀ of W = UΣVᵀ: exactly, and by polynomial iteration (Newton–Schulz)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.coefficients import POLYNOMIAL_SCHEDULES, PolynomialSchedule
from hf_pss.linalg.scaling import require_finite, unit_scaled

__all__ = ["newton_schulz", "polar_factor"]


def polar_factor(weight: Tensor) -> Tensor:
    """Return UVᵀ, the semi-orthogonal matrix nearest to W (Higham 2008, theorem 8.4).

    Of a rank-deficient W it is the partial isometry U_ρV_ρᵀ of the ρ singular values above
    σ₁·max(m, n)·ε; of the zero matrix, zero.

    Args:
        weight: (..., m, n), any real floating dtype.

    Returns:
        (..., m, n), float32, or float64 for float64.

    Raises:
        NonFiniteError: a matrix holds NaN or inf; the check reads from the device once.

    >>> polar_factor(torch.diag(torch.tensor([4.0, 0.5]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    scaled = unit_scaled(weight)
    require_finite(scaled)
    u, sigma, vh = torch.linalg.svd(scaled.matrix, full_matrices=False)
    rounding = max(weight.shape[-2:]) * torch.finfo(sigma.dtype).eps
    kept = sigma > rounding * sigma[..., :1]
    factor: Tensor = (u * kept.unsqueeze(-2)) @ vh
    return factor


def newton_schulz(
    weight: Tensor,
    *,
    schedule: str = "polar_express",
    num_steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate UVᵀ by X ← X (aI + bG + cG²), G = XᵀX, from X = W / ‖W‖_F.

    Only multiplications: made for the update of an optimizer. A singular value that, relative to
    ‖W‖_F, lies in the schedule's interval ends in its band, to 1e-6 in float32; one below stays
    below.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix with NaN or inf gives NaN; nothing is
            read back to the host.
        schedule: a row of `POLYNOMIAL_SCHEDULES`.
        num_steps: fewer or more steps than the schedule has; None: as many.
        dtype: iterate in this type, for instance torch.bfloat16; None: the type of the result.

    Returns:
        (..., m, n), float32, or float64 for float64.

    Raises:
        ConfigurationError: an unknown schedule, or num_steps below 1.

    >>> newton_schulz(torch.diag(torch.tensor([4.0, 0.5]))).round(decimals=4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    steps = _schedule(schedule).steps(_positive(num_steps))
    scaled = unit_scaled(weight)
    norm = torch.linalg.matrix_norm(scaled.matrix, keepdim=True)
    x = (scaled.matrix / torch.where(norm > 0, norm, 1.0)).to(dtype or scaled.matrix.dtype)
    wide = x.shape[-2] < x.shape[-1]
    x = x.mT if wide else x
    for a, b, c in steps:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    x = (x.mT if wide else x).to(scaled.matrix.dtype)
    return torch.where(scaled.finite[..., None, None], x, torch.nan)


def _schedule(name: str) -> PolynomialSchedule:
    if name not in POLYNOMIAL_SCHEDULES:
        known = ", ".join(POLYNOMIAL_SCHEDULES)
        raise ConfigurationError(f"You gave schedule={name!r}; choose one of {known}.")
    return POLYNOMIAL_SCHEDULES[name]


def _positive(num_steps: int | None) -> int | None:
    if num_steps is not None and num_steps < 1:
        raise ConfigurationError(f"You gave num_steps={num_steps}; give 1 or more, or None.")
    return num_steps
