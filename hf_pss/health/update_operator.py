"""Non-normality of the linearised update J = I − ηMH. H is the Hessian and M is Adam's diagonal.

A non-normal J may amplify for some steps although every eigenvalue is inside the unit circle. arXiv
2605.23476 measures κ(V), the condition number of J's eigenvectors. It finds that κ(V) is an order
of magnitude higher in unstable phases. This module computes three quantities: a bound of κ(V) from
Adam's second moments alone, the size of the commutator [H, M], and the curvatures at which momentum
makes κ(V) infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss.errors import ConfigurationError
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import by_parameter, matrix_refs
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")
"""The keys of v in the state of Adam and its family. AMSGrad divides by the maximum."""

# The shift keeps the exponent and three bits of the mantissa. So the middle of a bin is within 1/16
# of its values, and its root is within 1/32.
_SHIFT, _NUM_BINS = 20, 2048


class Denominators(NamedTuple):
    """The range of d = √v̂ + ε over one matrix, in units of its gradient. M is 1/d."""

    smallest: float
    """The minimum. All four numbers are NaN if an entry of v is NaN, inf or negative."""
    largest: float
    low: float
    """The quantile at the share `trim` from below, accurate to 3 %."""
    high: float
    """The quantile at the share `trim` from above, accurate to 3 %."""

    @property
    def sqrt_condition(self) -> float:
        """√κ(M) = √(max d / min d), where M = diag(1/d). It is inf if min d is 0.

        MH is similar to the symmetric M^½HM^½ = QΛQᵀ, so V = M^½Q holds eigenvectors of
        J = I − ηMH. Therefore κ(V) = √κ(M) needs no Hessian (arXiv 2605.23476). With eigenvectors
        of unit length κ is at most √n times the κ of the best scaling (van der Sluis 1969), so the
        bound is not exact. The number of one matrix applies to that matrix's block of H.
        """
        return _root_ratio(self.largest, self.smallest)

    @property
    def trimmed_sqrt_condition(self) -> float:
        """The same ratio between two quantiles [ours], accurate to 3 %.

        It is not a bound. But a single dead weight with d = ε does not determine it, so it is more
        suitable for an alarm.
        """
        return _root_ratio(self.high, self.low)


def denominators(second_moment: Tensor, *, eps: float, bias_correction: Tensor | float) -> Tensor:
    """Return √v̂ + ε = √(v / (1 − β₂ᵗ)) + ε, Adam's denominator (arXiv 1412.6980).

    Args:
        second_moment: v, any shape, any real floating dtype, not negative.
        eps: ε, which torch.optim adds outside the root.
        bias_correction: 1 − β₂ᵗ, in (0, 1]. 1 means no correction.

    Returns:
        The denominators in float32, or float64 for float64.

    >>> denominators(torch.tensor([0.25]), eps=0.5, bias_correction=0.25).tolist()
    [1.5]
    """
    v = second_moment.detach().to(compute_dtype(second_moment))
    return v.sqrt() / bias_correction**0.5 + eps


@torch.no_grad()
def measure_denominators(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    backend: Backend,
    *,
    trim: float = 0.001,
) -> dict[str, Denominators]:
    """Return the range of √v̂ + ε of each 2-D matrix by name.

    Cost: standard, for sampled steps. It needs a few passes over v, one of which counts v into
    2,048 bins, and one device-to-host read. If v is sharded, every rank counts the rows that it
    stores, and the counts are added up. The pieces of ZeRO are not rows, so every rank assembles
    the v of one matrix at a time. In that case ε comes from the first group. Also v has no bias
    correction, which changes the weight of ε relative to v.

    Args:
        views: The matrices to read.
        parameters: The model's parameters by canonical name.
        optimizer: Holds v. ε and β₂ are those of the parameter's group.
        backend: How parameters and their moments are stored.
        trim: The share of the weights that the trimmed version ignores at each end, in [0, 0.5).

    Returns:
        The ranges by name. Matrices without a second moment are left out. This happens before the
        first step, and with optimizers that keep no second moment.
    """
    found: list[tuple[str, float]] = []
    rows: list[Tensor] = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, slots in by_parameter(matrix_refs(views)):
        parameter = parameters[name]
        group = groups.get(id(parameter), optimizer.param_groups[0])
        correction = _bias_correction(optimizer, parameter, group)
        with backend.read_moment(optimizer, parameter, SECOND_MOMENTS) as part:
            if part is None:
                continue
            for slot in slots:
                piece = slot.view.piece(part.tensor, part.start, slot.expert)
                v = part.tensor.new_zeros(0) if piece is None else piece.read()
                found.append((slot.name, group.get("eps", 0.0)))
                rows.append(_counted(v, correction, backend))
    if not rows:
        return {}
    device = rows[0].device
    counted = torch.tensor(
        backend.sum_to_host(torch.cat([row.to(device) for row in rows])), dtype=torch.float64
    ).reshape(len(rows), -1)
    return {
        name: _ranges(row, eps, backend.world_size, trim)
        for (name, eps), row in zip(found, counted, strict=True)
    }


def whole_model(ranges: Mapping[str, Denominators]) -> Denominators:
    """Return the range over all matrices, which is the range of M for the whole model [ours].

    The quantiles of the result are the widest of all matrices. They are NaN if one matrix has NaN.

    >>> a, b = Denominators(1.0, 4.0, 1.0, 4.0), Denominators(2.0, 16.0, 2.0, 8.0)
    >>> whole_model({"a": a, "b": b}).sqrt_condition
    4.0
    """
    if not ranges or any(math.isnan(one.largest) for one in ranges.values()):
        return _BROKEN
    smallest, largest, low, high = zip(*ranges.values(), strict=True)
    return Denominators(min(smallest), max(largest), min(low), max(high))


_BROKEN = Denominators(math.nan, math.nan, math.nan, math.nan)


def _root_ratio(larger: float, smaller: float) -> float:
    return math.sqrt(larger) / math.sqrt(smaller) if smaller else math.inf


def _bias_correction(
    optimizer: Optimizer, parameter: Tensor, group: Mapping[str, object]
) -> Tensor | float:
    """Return 1 − β₂ᵗ on the device that counts the steps, or 1 if the optimizer counts none."""
    step = optimizer.state.get(parameter, {}).get("step")
    betas = group.get("betas")
    if step is None or not isinstance(betas, tuple | list):
        return 1.0
    correction: Tensor = 1 - float(betas[1]) ** torch.as_tensor(step, dtype=torch.float64)
    # A 0-dimensional tensor works with any device and keeps the dtype of the other operand.
    return correction if correction.device.type != "cpu" else float(correction)


def _counted(v: Tensor, correction: Tensor | float, backend: Backend) -> Tensor:
    """Return a row to be summed over ranks: this rank's extrema, then the counts by bits of v.

    √v̂ + ε grows with v, so the extrema and quantiles of v are sufficient. The extrema are in this
    rank's place of the row.
    """
    extrema = torch.zeros(backend.world_size, 4, dtype=torch.float64, device=v.device)
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=v.device)
    if v.numel():
        v = v if v.stride(-1) == 1 else v.mT  # as stored, because the order does not matter
        low, high = torch.aminmax(v)
        is_bad = ~(low.isfinite() & high.isfinite() & (low >= 0))
        # NaN would spoil the numbers of the other ranks in the sum, so a flag represents it.
        ends = [torch.where(is_bad, 1.0, x.double()) for x in (low, high)]
        bias = torch.as_tensor(correction, dtype=torch.float64, device=v.device)
        extrema[backend.rank] = torch.stack([1.0 + is_bad.double(), bias, *ends])
        # The bits of non-negative floats have the same order as the floats. -0 counts as negative.
        bits = v.reshape(-1).float().view(torch.int32) >> _SHIFT
        bins = bits.clamp_(0, _NUM_BINS - 1).long()
        # Integer sums do not depend on the order. bincount would read its maximum from the device.
        counts.scatter_add_(0, bins, counts.new_ones(()).expand_as(bins))
    return torch.cat([extrema.flatten(), counts.double()])


def _ranges(row: Tensor, eps: float, world_size: int, trim: float) -> Denominators:
    extrema, counts = row[: 4 * world_size].reshape(-1, 4), row[4 * world_size :]
    here = extrema[extrema[:, 0] > 0]  # 0: no row of the matrix; 1: numbers; 2: NaN or inf
    if len(here) == 0 or bool((here[:, 0] > 1).any()):
        return _BROKEN
    correction = float(here[0, 1]) or 1.0  # 0 if the state has made no step yet
    smallest, largest = float(here[:, 2].min()), float(here[:, 3].max())
    # The middle of a bin may be outside the range of its values.
    low, high = (
        min(max(_quantile(counts, share), smallest), largest) for share in (trim, 1 - trim)
    )
    ends = (math.sqrt(v / correction) + eps for v in (smallest, largest, low, high))
    return Denominators(*ends)


def _quantile(counts: Tensor, share: float) -> float:
    """Return the middle of the first bin up to which the counts reach this share, and 1."""
    wanted = max(math.ceil(share * float(counts.sum()) - 1e-6), 1)  # 1e-6: rounding of the product
    index = int((counts.cumsum(0) < wanted).sum())
    middle = torch.tensor((index << _SHIFT) + (1 << (_SHIFT - 1)), dtype=torch.int32)
    return float(middle.view(torch.float32))


def commutator_size(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    denominator: Sequence[Tensor],
    *,
    num_directions: int = 1,
    seed: int = 0,
) -> Tensor:
    """Return √(mean ‖[H, M]z‖²) ≈ ‖[H, M]‖_F/√n, with M = diag(1/d) and z random signs over √n.

    The commutator makes Adam's update operator non-normal (arXiv 2605.23476). We sample
    its Frobenius norm with Hutchinson's directions. The commutator is 0 if M is a
    multiple of the identity.

    Cost: full. There are two Hessian–vector products per direction, and no read from the device.

    Args:
        product: Maps z, a list of tensors with the parameters' shapes, to Hz.
        denominator: d = √v̂ + ε for each parameter.
        num_directions: At least 1. The error falls with the square root of this number.
        seed: The seed of the directions. The global random state is not used.

    Returns:
        A scalar in the units of H/d. It is NaN if a number is not finite.

    Raises:
        ConfigurationError: There is fewer than one direction, or no parameter.

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


def exceptional_points(lr: float, beta: float) -> tuple[float, float]:
    """Return λ* = (1 ∓ √β)²/η, the curvatures at which the modes of heavy-ball momentum coalesce.

    At these curvatures the companion matrix [[1 + β − ηλ, −β], [1, 0]] of x ← x − ηλx + β(x − x₋₁)
    has a double eigenvalue and one eigenvector, and κ(V) is infinite (arXiv 2605.23476). Between
    the two points the mode oscillates. Stability ends above both, at 2(1 + β)/η.

    Args:
        lr: η. For torch's SGD it is the learning rate times (1 − dampening).
        beta: Momentum, in [0, 1).

    Returns:
        The lower and the upper point, in units of the Hessian's eigenvalues.

    Raises:
        ConfigurationError: A number is out of range.

    >>> exceptional_points(0.5, 0.25)
    (0.5, 4.5)
    """
    if not (0 < lr < math.inf and 0 <= beta < 1):
        raise ConfigurationError(
            f"You gave lr={lr}, beta={beta}; give a rate above 0 and a momentum in [0, 1)."
        )
    root = math.sqrt(beta)
    return (1 - root) ** 2 / lr, (1 + root) ** 2 / lr


def exceptional_distance(curvature: float, lr: float, beta: float) -> float:
    """Return min |λ − λ*|/λ* over both exceptional points, without unit. The division is ours.

    Args:
        curvature: λ, an eigenvalue of the Hessian, for instance the largest.
        lr: As in `exceptional_points`.
        beta: As in `exceptional_points`.

    >>> round(exceptional_distance(4.05, 0.5, 0.25), 3)
    0.1
    """
    distances = [abs(curvature - point) / point for point in exceptional_points(lr, beta)]
    return math.nan if math.isnan(curvature) else min(distances)
