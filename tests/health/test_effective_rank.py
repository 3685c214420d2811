"""Effective rank of a model's matrices against entropy in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import bert, gpt2, llama

from hf_pss.health.singular_values import effective_rank_of, measure_effective_ranks
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import OneProcess
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = OneProcess()
TOLERANCE = 9e-7  # 3.2e-7, relative


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_effective_ranks_are_those_of_an_svd(make: type) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    measured = measure_effective_ranks(views, parameters, BACKEND)
    assert sorted(measured) == sorted(matrix_names(views))
    for view in views:
        sigma = torch.linalg.svdvals(view.read(parameters[view.parameter_name]).double())
        p = sigma / sigma.sum()
        exact = math.exp(-float((p * p.log()).sum()))
        assert measured[view.name] == pytest.approx(exact, rel=TOLERANCE)


def test_a_broken_matrix_has_none_and_harms_no_other() -> None:
    model = gpt2()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    before = measure_effective_ranks(views, parameters, BACKEND)
    with torch.no_grad():
        parameters["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.inf
        parameters["transformer.h.0.mlp.c_proj.weight"].zero_()
    after = measure_effective_ranks(views, parameters, BACKEND)
    assert math.isnan(after.pop("transformer.h.0.mlp.c_fc.weight"))
    assert after.pop("transformer.h.0.mlp.c_proj.weight") == 0
    assert after == {name: before[name] for name in after}
    assert measure_effective_ranks((), {}, BACKEND) == {}
    assert math.isnan(effective_rank_of([math.inf, 1.0]))
