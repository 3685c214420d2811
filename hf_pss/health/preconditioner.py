"""How non-normal Adam's update operator can be: a bound from its second moments alone.

The linearised update J = I − ηMH, H the Hessian and M Adam's diagonal, is not normal: it may
amplify for a while though every eigenvalue lies inside the unit circle. arXiv 2605.23476 watches
κ(V), the condition number of J's eigenvectors, an order of magnitude higher in its unstable phases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss.errors import ConfigurationError
from hf_pss.models.batching import MatrixRef, matrix_refs
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView

__all__ = [
    "ALARM_RATIO",
    "SECOND_MOMENTS",
    "Denominators",
    "denominators",
    "has_moved",
    "measure_denominators",
    "sqrt_condition",
    "whole_model",
]

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")
"""Where Adam and its family keep v: the maximum is what AMSGrad divides by."""

ALARM_RATIO = 10.0
"""The order of magnitude by which κ(V) separated stable from unstable phases (arXiv 2605.23476)."""

# An exponent and three bits of the mantissa: the middle of a bin is within 1/16 of what is in it,
# and its root within 1/32.
_SHIFT, _NUM_BINS = 20, 2048


@dataclass(frozen=True, slots=True)
class Denominators:
    """The range of d = √v̂ + ε over one matrix, in units of its gradient; M = 1/d."""

    smallest: float
    """NaN, as all four, where a v is NaN, inf or negative."""
    largest: float
    low: float
    """The quantile `trim` from below, to 3 %."""
    high: float
    """The quantile `trim` from above, to the same."""

    @property
    def sqrt_condition(self) -> float:
        """√κ(M) = √(max d / min d), the bound of arXiv 2605.23476; inf where min d is 0."""
        return _root_ratio(self.largest, self.smallest)

    @property
    def trimmed_sqrt_condition(self) -> float:
        """The same between two quantiles [ours]: one dead weight, d = ε, does not decide it.

        No bound of anything; steadier for an alarm. To 3 %.
        """
        return _root_ratio(self.high, self.low)


def denominators(second_moment: Tensor, *, eps: float, bias_correction: Tensor | float) -> Tensor:
    """Return √v̂ + ε = √(v / (1 − β₂ᵗ)) + ε, what Adam divides its step by (arXiv 1412.6980).

    Args:
        second_moment: v, any shape, any real floating dtype, not negative.
        eps: ε, as torch.optim adds it: outside of the root.
        bias_correction: 1 − β₂ᵗ, in (0, 1]; 1 where there is none.

    Returns:
        float32, or float64 for float64.

    >>> denominators(torch.tensor([0.25]), eps=0.5, bias_correction=0.25).tolist()
    [1.5]
    """
    dtype = torch.float64 if second_moment.dtype == torch.float64 else torch.float32
    return second_moment.detach().to(dtype).sqrt() / bias_correction**0.5 + eps


def sqrt_condition(denominator: Tensor) -> Tensor:
    """Return √κ(M) = √(max d / min d) of each matrix, M = diag(1/d), d = √v̂ + ε.

    MH is similar to the symmetric M^½HM^½ = QΛQᵀ, so V = M^½Q holds eigenvectors of J = I − ηMH,
    and κ(V) = √κ(M): no Hessian is needed (arXiv 2605.23476). With eigenvectors of unit length κ is
    at most √n times that of the best scaling (van der Sluis 1969), so not bounded by it exactly.
    Within one matrix it speaks of that matrix's block of H.

    Args:
        denominator: (..., m, n), positive.

    Returns:
        (...), at least 1; inf where one d is 0, NaN where one is NaN or inf.

    >>> sqrt_condition(torch.tensor([[1.0, 4.0], [2.0, 16.0]])).item()
    4.0
    """
    largest = denominator.amax(dim=(-2, -1))
    ratio = largest.sqrt() / denominator.amin(dim=(-2, -1)).sqrt()  # their quotient may overflow
    return torch.where(largest.isfinite(), ratio, torch.nan)


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

    Cost: standard, for sampled steps: a few passes over v, one of them to count it into 2,048 bins,
    and one device-to-host read. Where v is sharded every rank counts its own rows: quantiles need
    no gathering, since counts add up. Under ZeRO, whose pieces are no rows, one matrix's v at a
    time is assembled on every rank, ε is that of the first group, and v has no bias correction,
    which shifts what ε weighs beside it.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        optimizer: Holds v; ε and β₂ are those of the parameter's group.
        backend: How parameters are stored, and with them their moments.
        trim: Share of the weights left out at each end by the trimmed version, in [0, 0.5).

    Returns:
        Names to ranges; matrices without a second moment (no step yet, or an optimizer that keeps
        none) are left out.

    Raises:
        ConfigurationError: `trim` outside of its range.
    """
    if not 0 <= trim < 0.5:
        raise ConfigurationError(f"You gave trim={trim}; give a share in [0, 0.5).")
    found: list[tuple[str, float]] = []
    rows: list[Tensor] = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    by_parameter: dict[str, list[MatrixRef]] = {}
    for slot in matrix_refs(views):
        by_parameter.setdefault(slot.view.parameter_name, []).append(slot)
    for name, slots in by_parameter.items():
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
    told = torch.tensor(
        backend.sum_to_host(torch.cat([row.to(device) for row in rows])), dtype=torch.float64
    ).reshape(len(rows), -1)
    return {
        name: _ranges(row, eps, backend.world_size, trim)
        for (name, eps), row in zip(found, told, strict=True)
    }


def whole_model(ranges: Mapping[str, Denominators]) -> Denominators:
    """Return the range over all matrices: M of the whole model, of which κ(V) speaks. [ours].

    The quantiles of the result are the widest of the matrices'. NaN where one matrix has NaN.

    >>> a, b = Denominators(1.0, 4.0, 1.0, 4.0), Denominators(2.0, 16.0, 2.0, 8.0)
    >>> whole_model({"a": a, "b": b}).sqrt_condition
    4.0
    """
    found = tuple(ranges.values())
    if not found or any(math.isnan(one.largest) for one in found):
        return _BROKEN
    return Denominators(
        min(one.smallest for one in found),
        max(one.largest for one in found),
        min(one.low for one in found),
        max(one.high for one in found),
    )


def has_moved(reference: float, now: float) -> bool:
    """Return whether the bound has moved by the paper's order of magnitude, either way, or is NaN.

    Which reference to take is ours to say: the bound's own moving average after the learning rate's
    warm-up, never an absolute level, since ε alone can set it.

    >>> has_moved(100.0, 300.0), has_moved(100.0, 1000.0), has_moved(100.0, 9.0)
    (False, True, True)
    """
    return not reference / ALARM_RATIO < now < reference * ALARM_RATIO


_BROKEN = Denominators(math.nan, math.nan, math.nan, math.nan)


def _root_ratio(larger: float, smaller: float) -> float:
    if smaller == 0:
        return math.inf
    return math.sqrt(larger) / math.sqrt(smaller)


def _bias_correction(
    optimizer: Optimizer, parameter: Tensor, group: Mapping[str, object]
) -> Tensor | float:
    """Return 1 − β₂ᵗ, on the device where the step is counted there; 1 where none is counted."""
    step = optimizer.state.get(parameter, {}).get("step")
    betas = group.get("betas")
    if step is None or not isinstance(betas, tuple | list):
        return 1.0
    correction: Tensor = 1 - float(betas[1]) ** torch.as_tensor(step, dtype=torch.float64)
    # 0-dimensional: it goes with tensors of any device and leaves their dtype alone.
    return correction if correction.device.type != "cpu" else float(correction)


def _counted(v: Tensor, correction: Tensor | float, backend: Backend) -> Tensor:
    """Return what adds up over ranks: extrema in one's own place, then counts of v by its bits.

    √v̂ + ε grows with v, so neither is taken of every weight.
    """
    extrema = torch.zeros(backend.world_size, 4, dtype=torch.float64, device=v.device)
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=v.device)
    if v.numel():
        v = v if v.stride(-1) == 1 else v.mT  # as it is stored: the order counts for nothing
        low, high = torch.aminmax(v)
        is_bad = ~(low.isfinite() & high.isfinite() & (low >= 0))
        # A sum over ranks must not make NaN of another's numbers: the flag says it instead.
        ends = [torch.where(is_bad, 1.0, x.double()) for x in (low, high)]
        bias = torch.as_tensor(correction, dtype=torch.float64, device=v.device)
        extrema[backend.rank] = torch.stack([1.0 + is_bad.double(), bias, *ends])
        # Bits of floats that are not negative are in the order of the floats; -0 is negative here.
        bits = v.reshape(-1).float().view(torch.int32) >> _SHIFT
        bins = bits.clamp_(0, _NUM_BINS - 1).long()
        # Of integers: the same in any order. bincount would read its maximum back from the device.
        counts.scatter_add_(0, bins, counts.new_ones(()).expand_as(bins))
    return torch.cat([extrema.flatten(), counts.double()])


def _ranges(row: Tensor, eps: float, world_size: int, trim: float) -> Denominators:
    extrema, counts = row[: 4 * world_size].reshape(-1, 4), row[4 * world_size :]
    here = extrema[extrema[:, 0] > 0]  # 0: nothing of the matrix; 1: numbers; 2: NaN or inf
    if len(here) == 0 or bool((here[:, 0] > 1).any()):
        return _BROKEN
    correction = float(here[0, 1]) or 1.0  # a state before its first step
    smallest, largest = float(here[:, 2].min()), float(here[:, 3].max())
    # The middle of a bin may lie outside of the numbers in it.
    low, high = (
        min(max(_quantile(counts, share), smallest), largest) for share in (trim, 1 - trim)
    )
    ends = (math.sqrt(v / correction) + eps for v in (smallest, largest, low, high))
    return Denominators(*ends)


def _quantile(counts: Tensor, share: float) -> float:
    """Return the middle of the first bin with at least this share, and something, up to it."""
    wanted = max(math.ceil(share * float(counts.sum()) - 1e-6), 1)  # 1e-6: rounding of the product
    index = int((counts.cumsum(0) < wanted).sum())
    middle = torch.tensor((index << _SHIFT) + (1 << (_SHIFT - 1)), dtype=torch.int32)
    return float(middle.view(torch.float32))
