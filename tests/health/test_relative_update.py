"""Relative updates against norms in float64, and rates of change."""

from __future__ import annotations

import math
import weakref
from typing import Any, ClassVar

import pytest
import torch
from helpers import gpt2, llama

from hf_pss.health.step_series import ChangeRates
from hf_pss.health.update_metrics import RelativeUpdateMeter
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
METER_TOLERANCE = 3e-7  # 1.1e-7, relative


def oracle(before: torch.Tensor, after: torch.Tensor) -> float:
    moved = torch.linalg.matrix_norm(after.double() - before.double())
    return float(moved / torch.linalg.matrix_norm(before.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_meter_measures_every_matrix(make: type, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = make().to(dtype)
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    before = {view.name: view.read(parameters[view.parameter_name]).clone() for view in views}
    meter = RelativeUpdateMeter(views, BACKEND)
    meter.start(parameters)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1e-2 * torch.randn_like(p))
    measured = meter.stop(parameters)
    assert tuple(measured) == matrix_names(views)
    for view in views:
        after = view.read(parameters[view.parameter_name])
        expected = oracle(before[view.name], after)
        assert measured[view.name] == pytest.approx(expected, rel=METER_TOLERANCE)
    assert meter.stop(parameters) == {}


class Watched(Backend):
    """Counts the tensors that still exist whenever a parameter is read."""

    tensors: ClassVar[list[weakref.ref[torch.Tensor]]] = []
    counts: ClassVar[list[int]] = []

    def part(self, parameter: torch.Tensor, rows: slice | None = None) -> Any:
        self.counts.append(sum(tensor() is not None for tensor in self.tensors))
        return Backend.part(self, parameter, rows)


def test_the_meter_keeps_no_copy_of_what_it_has_measured() -> None:
    model = gpt2(num_layers=2)
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    backend = Watched()
    meter = RelativeUpdateMeter(views, backend)
    meter.start(parameters)
    backend.tensors.extend(weakref.ref(copy) for copy in meter._before.values())
    backend.counts.clear()
    meter.stop(parameters)
    assert backend.counts == list(range(len(backend.tensors), 0, -1))


def test_the_meter_distinguishes_zero_matrices_from_broken_ones() -> None:
    model = gpt2()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    meter = RelativeUpdateMeter(views, BACKEND)
    names = [f"transformer.h.0.{x}.weight" for x in ("mlp.c_fc", "mlp.c_proj", "attn.c_proj")]
    with torch.no_grad():
        parameters[names[0]].zero_()
        parameters[names[1]].zero_()
    meter.start(parameters)
    with torch.no_grad():
        parameters[names[0]].add_(1.0)
        parameters[names[2]][0, 0] = math.nan
    measured = meter.stop(parameters)
    assert [measured.pop(name) for name in names[:2]] == [math.inf, 0]
    assert math.isnan(measured.pop(names[2]))
    assert set(measured.values()) == {0.0}
    nothing = RelativeUpdateMeter((), BACKEND)
    nothing.start({})
    assert nothing.stop({}) == {}


def test_rates_add_up_to_the_change_at_any_steps() -> None:
    rates = ChangeRates()
    series = {0: 2.0, 1: 2.2, 5: 1.1, 6: 4.0}
    total, last = 0.0, 0
    for step, value in series.items():
        total += rates.of(step, {"w": value}).get("w", 0.0) * (step - last)
        last = step
    assert total == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_one_bad_value_spoils_one_rate(bad: float) -> None:
    rates = ChangeRates()
    assert rates.of(0, {"w": 1.0, "x": bad}) == {}
    assert math.isnan(rates.of(1, {"w": bad})["w"])
    assert rates.of(2, {"w": math.e, "x": 1.0}) == {"w": 0.5}
    assert rates.of(2, {"w": 7.0}) == {}  # the step had its value
    assert rates.of(3, {"w": math.e, "x": 1.0}) == {"w": 0.0, "x": 0.0}
