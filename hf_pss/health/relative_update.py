"""The share of each selected matrix that an update changes, and rates of change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_pss.linalg import frobenius_norm
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.batching import MatrixRef, matrix_names, matrix_refs
from hf_pss.models.distributed import Backend, Part
from hf_pss.models.selection import MatrixView

__all__ = [
    "ChangeRates",
    "RelativeUpdateMeter",
    "relative_update",
]


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """Return ‖W_t − W_{t−1}‖_F / ‖W_{t−1}‖_F.

    This is the inverse of the trust ratio of LARS and LAMB (arXiv 1708.03888, 1904.00962). Here it
    is computed from the update itself, including weight decay. It is the share of the matrix that
    changes per step, without unit.

    Args:
        before: (..., m, n), any real floating dtype.
        after: (..., m, n).

    Returns:
        The ratio, (...), float32, or float64 for float64 inputs. It is 0 if nothing has changed,
        inf if a zero matrix has changed, and NaN if one input holds NaN or inf.

    >>> relative_update(torch.eye(2), 1.5 * torch.eye(2)).item()
    0.5
    """
    dtype = compute_dtype(before)
    moved = frobenius_norm(after.to(dtype) - before.to(dtype))
    return _ratio(moved, frobenius_norm(before))


class RelativeUpdateMeter:
    """Measures one update of each 2-D matrix, and keeps a copy of the matrices during the update.

    Cost: standard. It needs the memory of one copy and of one parameter's difference, three passes
    over the copy at measured steps, and one device-to-host read. If parameters are sharded, every
    rank measures the rows that it stores. Do not use it with a backend that cannot hold an update
    back, because both calls would then come after the update.

    Args:
        views: The matrices to read.
        backend: How parameters are stored.
    """

    def __init__(self, views: Sequence[MatrixView], backend: Backend) -> None:
        self._views = tuple(views)
        self._backend = backend
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the matrices before the update."""
        names = dict.fromkeys(view.parameter_name for view in self._views)
        with_copy = {}
        for name in names:
            with self._backend.part(parameters[name]) as part:
                with_copy[name] = part.tensor.clone()
        self._before = with_copy

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Return ‖ΔW‖_F/‖W‖_F of each 2-D matrix by name since `start`, and drop the copy.

        The numbers are those of `relative_update`, with one difference: for types narrower than
        float64 the squares are summed in float32. So entries beyond 1e19 give inf, and entries
        below 1e-22 give zero. Without a `start` the result is empty.
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
                # The copy of a parameter is freed as soon as the parameter has been measured.
                rows += [pair.to(device) for pair in _squares(slots, before.pop(name), part)]
        squares = torch.stack(rows)
        self._backend.total_(squares)
        changes, norms = squares.sqrt().unbind(dim=1)
        ratios = self._backend.agree(_ratio(changes, norms))
        names = [slot.name for slots in by_parameter.values() for slot in slots]
        found = dict(zip(names, ratios, strict=True))
        return {name: found[name] for name in matrix_names(self._views)}


class ChangeRates:
    """Relative rates of change per step of positive numbers by name: (ln x_t − ln x_s) / (t − s).

    [ours] It applies to σ₁, ‖W‖_F, stable rank and effective rank. A rate of 0.01 is
    one per cent per step, and the rate of a product is the sum of its factors' rates. A
    new name has no rate yet.

    >>> rates = ChangeRates()
    >>> rates.of(10, {"w": 1.0}), rates.of(12, {"w": math.e})
    ({}, {'w': 0.5})
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def of(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return the rates since the last value of each name, and store the new values.

        A rate is NaN if one of the two values is not positive and finite. Such a value is not
        stored, so one NaN spoils only one rate.

        Args:
            step: The step of the values. A name is skipped if its last value comes from
                this step or a later one.
            values: The values by name. Each name may have any unit, but must keep it.
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
    """Return ‖ΔW‖_F² and ‖W‖_F² of this rank's rows of each matrix, (2,), float64."""
    dtype = compute_dtype(old)
    moved = part.tensor.to(dtype) - old.to(dtype)
    return [torch.stack([_square(slot, x, part.start) for x in (moved, old)]) for slot in slots]


def _square(slot: MatrixRef, stored: Tensor, start: int) -> Tensor:
    """Return ‖·‖_F² of this rank's rows of a matrix, float64."""
    piece = slot.view.piece(stored, start, slot.expert)
    if piece is None:
        return stored.new_zeros((), dtype=torch.float64)
    # If all of this were in float64, torch would copy the complete matrix on a CPU.
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(stored))
    return norm.double().square()


def _ratio(moved: Tensor, norm: Tensor) -> Tensor:
    """Return the ratio, where 0/0 = 0 for a zero matrix that has not changed."""
    return torch.where((moved == 0) & (norm == 0), 0.0, moved / norm)
