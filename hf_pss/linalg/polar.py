"""The polar factor UVᵀ of W = UΣVᵀ, by polynomial iteration (Newton–Schulz).

The table of schedules holds the coefficients, their source and the measured band of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.scaling import compute_dtype, require_matrix

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PolynomialSchedule:
    """Odd quintics p(x) = ax + bx³ + cx⁵ that are applied in turn to every singular value."""

    coefficients: tuple[Triple, ...]
    """(a, b, c) for each step. A longer iteration repeats the last one."""
    source: str
    """The publication of the coefficients."""
    interval: tuple[float, float]
    """The range of singular values, relative to ‖W‖_F, for which the band holds."""
    band: tuple[float, float]
    """The range of these values after the full schedule in exact arithmetic. A test measures it."""

    def steps(self, num_steps: int | None) -> tuple[Triple, ...]:
        """Return the triples of num_steps steps of the iteration, or of the complete schedule."""
        count = len(self.coefficients) if num_steps is None else num_steps
        missing = max(0, count - len(self.coefficients))
        return self.coefficients[:count] + self.coefficients[-1:] * missing


def _with_safety(coefficients: tuple[Triple, ...], factor: float) -> tuple[Triple, ...]:
    # Return p(x / factor). Rounding may push a value above 1, where a tight polynomial would
    # diverge. The last step is safe without this.
    *first, last = coefficients
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in first), last)


POLYNOMIAL_SCHEDULES: dict[str, PolynomialSchedule] = {
    "keller": PolynomialSchedule(
        coefficients=((3.4445, -4.7750, 2.0315),) * 5,
        source="K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/",
        interval=(3e-3, 1.0),
        band=(0.6818, 1.2024),
    ),
    "polar_express": PolynomialSchedule(
        coefficients=_with_safety(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            factor=1.01,
        ),
        source="Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932, algorithm 1 (safety 1.01)",
        interval=(1e-3, 1.0),
        band=(1 - 1e-14, 1 + 1e-14),
    ),
    "polar_express_4": PolynomialSchedule(
        coefficients=_with_safety(
            (
                (8.219101105846395, -23.40195672053618, 17.15819894322091),
                (4.004876059148972, -2.922346774508395, 0.549118526726345),
                (3.5235614361928365, -2.6398035290594555, 0.5272128341911068),
                (2.5115271663527294, -1.8524483560830054, 0.43883263558021046),
            ),
            factor=1.01,
        ),
        source="Ours: the same algorithm, for four steps and singular values from 3e-3 on. Its "
        "band is narrower than that of Keller's five steps",
        interval=(3e-3, 1.0),
        band=(0.7740, 1.2070),
    ),
    "classic": PolynomialSchedule(
        coefficients=((15 / 8, -10 / 8, 3 / 8),) * 12,
        source="Björck & Bowie 1971, SIAM J. Numer. Anal. 8(2), the iteration of order 3",
        interval=(3e-3, 1.0),
        band=(1 - 5e-11, 1 + 1e-14),
    ),
}


def newton_schulz(
    weight: Tensor,
    *,
    schedule: str = "polar_express",
    num_steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate UVᵀ by X ← X (aI + bG + cG²), G = XᵀX, from X = W / ‖W‖_F.

    The iteration consists only of multiplications, which an optimizer's update needs. Consider a
    singular value relative to ‖W‖_F. If it is in the schedule's interval, it ends in the band, to
    1e-6 in float32. If it is smaller, it stays below the band. If a matrix is at least twice as
    long as wide, the iteration works on its Gram matrix.

    Args:
        weight: (..., m, n), any real floating dtype. A matrix with NaN or inf gives NaN. The
            function does not read from the device.
        schedule: A row of `POLYNOMIAL_SCHEDULES`.
        num_steps: The number of steps. None means the number of steps in the schedule.
        dtype: The dtype of the iteration, such as torch.bfloat16. None means
            the dtype of the result.

    Returns:
        The approximation, (..., m, n), float32, or float64 for float64.

    Raises:
        ConfigurationError: The schedule is unknown, or num_steps is below 1.

    >>> newton_schulz(torch.diag(torch.tensor([4.0, 0.5]))).round(decimals=4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if schedule not in POLYNOMIAL_SCHEDULES:
        known = ", ".join(POLYNOMIAL_SCHEDULES)
        raise ConfigurationError(f"You gave schedule={schedule!r}; choose one of {known}.")
    if num_steps is not None and num_steps < 1:
        raise ConfigurationError(f"You gave num_steps={num_steps}; give 1 or more, or None.")
    steps = POLYNOMIAL_SCHEDULES[schedule].steps(num_steps)
    require_matrix(weight)
    result_dtype = compute_dtype(weight)
    x = _of_unit_norm(weight.detach(), dtype or result_dtype).flatten(0, -3)
    # Iterate on contiguous rows. The result then has the memory layout of the weight.
    is_flipped = x.stride(-1) != 1
    x = x.mT if is_flipped else x
    # On a CPU a batch of one matrix is slower than a single matrix.
    x = _iterate(x[0], steps)[None] if len(x) == 1 else _iterate(x, steps)
    return (x.mT if is_flipped else x).to(result_dtype).reshape(weight.shape)


# In units of n³ for m = a·n, a plain step takes 2a + 1, and a Gram form of
# three steps takes 2a + 9.
_GRAM_ASPECT = 2
# The Gram form needs singular values of similar size, which two plain steps ensure. Without them,
# it would diverge in bfloat16 if one direction leads by a factor of 10. The product of polynomials
# amplifies rounding, so it is applied after three steps, and the Gram matrix is computed again.
_PLAIN_STEPS, _GRAM_STEPS = 2, 3


def _of_unit_norm(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W / ‖W‖_F with at least three dimensions. If W holds NaN or inf, it is NaN."""
    weight = weight if weight.ndim > 2 else weight[None]
    # On a CPU the norm of order inf would take as long as a step of the iteration.
    ends = weight.amax((-2, -1), keepdim=True), -weight.amin((-2, -1), keepdim=True)
    largest = torch.maximum(*ends).to(compute_dtype(weight))
    is_finite = largest.isfinite()
    exponent = torch.frexp(torch.where(is_finite, largest, 1.0)).exponent.clamp(-126, 126)
    scaled = weight * torch.ldexp(torch.ones_like(largest), -exponent)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0).where(is_finite, torch.nan)
    return scaled.div_(norm).to(dtype)


def _iterate(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    """Apply the steps to one matrix (m, n) or to several (b, m, n)."""
    if max(x.shape[-2:]) < _GRAM_ASPECT * min(x.shape[-2:]):
        return _in_plain_form(x, steps)
    x = _in_plain_form(x, steps[:_PLAIN_STEPS])
    for first in range(_PLAIN_STEPS, len(steps), _GRAM_STEPS):
        x = _in_gram_form(x, steps[first : first + _GRAM_STEPS])
    return x


def _in_plain_form(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    for a, b, c in steps:
        gram = _gram(x)
        polynomial = _symmetric(gram, gram, plus=gram, beta=b, alpha=c)
        x = _multiply_add(x, *_on_the_short_side(x, polynomial), beta=a)
    return x


def _in_gram_form(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    """Iterate on R = XᵀX by R ← R P², Q ← Q P with P = aI + bR + cR², and return X Q."""
    gram = _gram(x)
    factors: list[Tensor] = []
    for a, b, c in steps:
        for last in factors[-1:]:
            gram = _symmetric(_symmetric(gram, last), last)
        factor = _symmetric(gram, gram, plus=gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        factors.append(factor)
    left, right = _on_the_short_side(x, functools.reduce(_symmetric, factors))
    return left @ right


def _gram(x: Tensor) -> Tensor:
    """Return the smaller Gram matrix: XᵀX, or XXᵀ if X is wide."""
    return _symmetric(x.mT, x) if x.shape[-2] >= x.shape[-1] else _symmetric(x, x.mT)


def _on_the_short_side(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of X P, or of P X if X is wide."""
    return (x, factor) if x.shape[-2] >= x.shape[-1] else (factor, x)


# On a CPU, blocks below the diagonal are copied if this is faster than multiplying. Matrix units
# multiply bfloat16 so fast that this needs long rows as well.
_STRIPED_FROM, _LONG_IN_BFLOAT16, _NUM_STRIPS = 512, 1024, 4


def _symmetric(
    left: Tensor,
    right: Tensor,
    *,
    plus: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the symmetric β Y + α L R. Y is `plus`. L is (..., n, m), and R is (..., m, n)."""
    n, length = left.shape[-2:]
    is_fast = left.dtype == torch.bfloat16 and length < _LONG_IN_BFLOAT16
    if not left.is_cpu or n < _STRIPED_FROM or is_fast:
        return _multiply_add(plus, left, right, beta=beta, alpha=alpha)
    found = left.new_empty((*left.shape[:-1], n))
    size = -(-n // _NUM_STRIPS)
    for start in range(0, n, size):
        rows, right_of_it = slice(start, start + size), slice(start + size, n)
        part = None if plus is None else plus[..., rows, start:]
        strip = _multiply_add(part, left[..., rows, :], right[..., start:], beta=beta, alpha=alpha)
        found[..., rows, start:] = strip
        found[..., right_of_it, rows] = strip[..., size:].mT
    return found


def _multiply_add(
    y: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return β Y + α L R, rounded once, for one or several matrices. Without Y return L R."""
    if y is None:
        return left @ right
    multiply = torch.addmm if y.ndim == 2 else torch.baddbmm
    return multiply(y, left, right, beta=beta, alpha=alpha)
