"""How far an update moved each selected matrix, as a share of it; and rates of change.

How near the sharpest curvature comes to where momentum's two modes coalesce.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import frobenius_norm
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import MatrixRef, matrix_names, matrix_refs
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.selection import MatrixView

__all__ = [
    "ChangeRates",
    "RelativeUpdateMeter",
    "exceptional_distance",
    "exceptional_points",
    "relative_update",
]


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """Return ‖W_t − W_{t−1}‖_F / ‖W_{t−1}‖_F.

    The trust ratio of LARS and LAMB (arXiv 1708.03888, 1904.00962), turned upside down and taken of
    the update itself, weight decay included. A share of the matrix a step, without unit.

    Args:
        before: (..., m, n), any real floating dtype.
        after: (..., m, n).

    Returns:
        (...), float32, or float64 for float64: 0 where nothing moved, inf where a zero matrix did,
        NaN where one holds NaN or inf.

    >>> relative_update(torch.eye(2), 1.5 * torch.eye(2)).item()
    0.5
    """
    dtype = compute_dtype(before)
    moved = frobenius_norm(after.to(dtype) - before.to(dtype))
    return _ratio(moved, frobenius_norm(before))


class RelativeUpdateMeter:
    """Measures one update of each 2-D matrix; keeps a copy of the matrices while it happens.

    Cost: standard. The memory of one copy and of one parameter's difference, and three passes over
    it at the steps that are measured; one device-to-host read. Where parameters are sharded every
    rank measures its own rows. Not for a backend that cannot hold an update back: both calls would
    come after it.

    Args:
        views: What to read.
        backend: How parameters are stored.
    """

    def __init__(self, views: Sequence[MatrixView], backend: Backend) -> None:
        self._views = tuple(views)
        self._backend = backend
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember the matrices as they are before the update."""
        names = dict.fromkeys(view.parameter_name for view in self._views)
        with_copy = {}
        for name in names:
            with self._backend.part(parameters[name]) as part:
                with_copy[name] = part.tensor.clone()
        self._before = with_copy

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Return ‖ΔW‖_F/‖W‖_F of each 2-D matrix by name since `start`, and forget the copy.

        As in `relative_update`, but that squares are summed in float32 for anything narrower than
        float64: entries beyond 1e19 are inf, and below 1e-22 zero. Empty without a `start`.
        """
        before, self._before = self._before, {}
        if not before:
            return {}
        by_parameter: dict[str, list[MatrixRef]] = {}
        for slot in matrix_refs(self._views):
            by_parameter.setdefault(slot.view.parameter_name, []).append(slot)
        device = next(iter(before.values())).device
        rows: list[Tensor] = []
        for name, slots in by_parameter.items():
            with self._backend.part(parameters[name]) as part:
                # What is measured is kept no longer.
                rows += [pair.to(device) for pair in _squares(slots, before.pop(name), part)]
        squares = torch.stack(rows)
        self._backend.total_(squares)
        changes, norms = squares.sqrt().unbind(dim=1)
        told = self._backend.agree(_ratio(changes, norms))
        names = [slot.name for slots in by_parameter.values() for slot in slots]
        found = dict(zip(names, told, strict=True))
        return {name: found[name] for name in matrix_names(self._views)}


class ChangeRates:
    """Rates of change of positive numbers by name: (ln x_t − ln x_s) / (t − s), a share a step.

    [ours] Of σ₁, ‖W‖_F, stable or effective rank; 0.01 is one per cent a step, and the rate of a
    product is the sum of its factors'. A name that comes for the first time has no rate yet.

    >>> rates = ChangeRates()
    >>> rates.of(10, {"w": 1.0}), rates.of(12, {"w": math.e})
    ({}, {'w': 0.5})
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def of(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return the rates since each name's last value, and remember these.

        NaN where one of the two is not a positive finite number: such a value is not remembered, so
        that one NaN spoils one rate.

        Args:
            step: Of the values; a name that came at this step or a later one is passed over.
            values: In any one unit a name.
        """
        rates = {}
        for name, value in values.items():
            last_step, last = self._last.get(name, (step, math.nan))
            is_usable = 0 < value < math.inf
            if last_step < step:
                both = is_usable and last > 0
                rate = (math.log(value) - math.log(last)) / (step - last_step) if both else math.nan
                rates[name] = rate
            if is_usable and (name not in self._last or last_step < step):
                self._last[name] = (step, value)
        return rates


def _squares(slots: Sequence[MatrixRef], old: Tensor, part: Part) -> list[Tensor]:
    """Return ‖ΔW‖_F² and ‖W‖_F² of each matrix's rows that are here, (2,), float64."""
    dtype = compute_dtype(old)
    moved = part.tensor.to(dtype) - old.to(dtype)
    return [torch.stack([_square(slot, x, part.start) for x in (moved, old)]) for slot in slots]


def _square(slot: MatrixRef, stored: Tensor, start: int) -> Tensor:
    """Return ‖·‖_F² of the rows of a matrix that are here, float64."""
    piece = slot.view.piece(stored, start, slot.expert)
    if piece is None:
        return stored.new_zeros((), dtype=torch.float64)
    # Not in float64 throughout: on a CPU torch would make a whole copy for that.
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(stored))
    return norm.double().square()


def _ratio(moved: Tensor, norm: Tensor) -> Tensor:
    """0/0 is 0: a zero matrix that stayed; inf of one that moved; NaN passes, inf/inf is NaN."""
    return torch.where((moved == 0) & (norm == 0), 0.0, moved / norm)


def exceptional_points(lr: float, beta: float) -> tuple[float, float]:
    """Return λ* = (1 ∓ √β)²/η, the curvatures at which heavy ball's modes coalesce.

    There the companion matrix [[1 + β − ηλ, −β], [1, 0]] of x ← x − ηλx + β(x − x₋₁) has a double
    eigenvalue and one eigenvector, and κ(V) is infinite (arXiv 2605.23476). Between the two the
    mode oscillates; stability ends at 2(1 + β)/η, above both.

    Args:
        lr: η; with torch's SGD the learning rate times (1 − dampening).
        beta: Momentum, in [0, 1).

    Returns:
        The lower and the upper one, in units of the Hessian's eigenvalues.

    Raises:
        ConfigurationError: A number outside of its range.

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
    """Return min |λ − λ*|/λ* over both exceptional points, without unit; dividing by λ* is ours.

    Args:
        curvature: λ, an eigenvalue of the Hessian, for instance the largest.
        lr: As in `exceptional_points`.
        beta: As there.

    >>> round(exceptional_distance(4.05, 0.5, 0.25), 3)
    0.1
    """
    distances = [abs(curvature - point) / point for point in exceptional_points(lr, beta)]
    return math.nan if math.isnan(curvature) else min(distances)
