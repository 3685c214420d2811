"""Effective rank of a model's matrices against entropy in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from helpers import bert, gpt2, llama
from torch import nn

from hf_pss.health.spectrum_metrics import effective_rank_of, measure_spectra
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices

BACKEND = Backend()
TOLERANCE = 9e-7  # 3.2e-7, relative


def effective_ranks(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter]
) -> dict[str, float]:
    spectra = measure_spectra(views, parameters, BACKEND)
    return {name: effective_rank_of(sigmas) for name, sigmas in spectra.items()}


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_effective_ranks_are_those_of_an_svd(make: type) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    measured = effective_ranks(views, parameters)
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
    before = effective_ranks(views, parameters)
    with torch.no_grad():
        parameters["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.inf
        parameters["transformer.h.0.mlp.c_proj.weight"].zero_()
    after = effective_ranks(views, parameters)
    assert math.isnan(after.pop("transformer.h.0.mlp.c_fc.weight"))
    assert after.pop("transformer.h.0.mlp.c_proj.weight") == 0
    assert after == {name: before[name] for name in after}
    assert effective_ranks((), {}) == {}
    assert math.isnan(effective_rank_of([math.inf, 1.0]))
