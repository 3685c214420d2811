"""Alignment of neighbours against singular vectors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import bert, gpt2, llama
from torch import Tensor

from hf_pss.health.spectrum_metrics import (
    Neighbours,
    first_directions,
    measure_alignments,
    residual_neighbours,
)
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices

BACKEND = Backend()
# Cosines in [0, 1], so absolute; vectors of float32 over the relative gap of σ₁ and σ₂.
TOLERANCE = 1.8e-5  # 6.3e-6


def neighbour_alignment(writer: Tensor, reader: Tensor) -> Tensor:
    return (first_directions(writer)[0] * first_directions(reader)[1]).sum(dim=-1).abs()


def oracle(writer: Tensor, reader: Tensor) -> float:
    u = torch.linalg.svd(writer.double()).U[:, 0]
    v = torch.linalg.svd(reader.double()).Vh[0]
    return abs(float(u @ v))


@pytest.mark.parametrize("sides", [(16, 16, 16), (48, 16, 32), (16, 48, 8), (5, 1, 3)], ids=str)
def test_it_is_that_of_a_decomposition_in_float64(sides: tuple[int, int, int]) -> None:
    torch.manual_seed(sum(sides))
    n, m, k = sides
    writer, reader = torch.randn(m, n), torch.randn(k, m)
    assert float(neighbour_alignment(writer, reader)) == pytest.approx(
        oracle(writer, reader), abs=TOLERANCE
    )


def test_matrices_too_large_to_decompose_agree_where_one_direction_stands_out() -> None:
    torch.manual_seed(0)
    spike = torch.nn.functional.normalize(torch.randn(3, 200), dim=-1)
    writer = torch.randn(200, 160) / 15 + 9 * torch.outer(spike[0], spike[2, :160])
    reader = torch.randn(180, 200) / 15 + 9 * torch.outer(spike[1, :180], spike[0] + spike[1])
    assert float(neighbour_alignment(writer, reader)) == pytest.approx(
        oracle(writer, reader), abs=TOLERANCE
    )


def test_a_reader_of_what_is_written_is_aligned_and_one_of_something_else_is_not() -> None:
    e = torch.eye(6)
    writer = torch.outer(e[2], e[0]) + 0.1 * torch.outer(e[3], e[1])
    assert float(neighbour_alignment(writer, torch.outer(e[0], e[2]))) == pytest.approx(1)
    assert float(neighbour_alignment(writer, -torch.outer(e[0], e[2]))) == pytest.approx(1)
    assert float(neighbour_alignment(writer, torch.outer(e[0], e[3]))) == 0


def test_independent_noise_has_the_mean_of_random_directions() -> None:
    torch.manual_seed(0)
    n, pairs = 64, 2000
    found = neighbour_alignment(torch.randn(pairs, n, 4), torch.randn(pairs, 4, n))
    scatter = math.sqrt((1 - 2 / math.pi) / n / pairs)
    assert float(found.mean()) == pytest.approx(math.sqrt(2 / math.pi / n), abs=3 * scatter)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_scale_does_not_matter(factor: float) -> None:
    torch.manual_seed(5)
    writer, reader = torch.randn(12, 8), torch.randn(9, 12)
    expected = neighbour_alignment(writer, reader)
    assert torch.equal(neighbour_alignment(writer * factor, reader), expected)
    assert torch.equal(neighbour_alignment(writer, reader * factor), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_harms_no_other_of_its_stack(bad: float) -> None:
    torch.manual_seed(3)
    writers, readers = torch.randn(5, 12, 8), torch.randn(5, 9, 12)
    alone = neighbour_alignment(writers[4], readers[4])
    writers[0, 1, 1], readers[1, 2, 2] = bad, bad
    writers[2], readers[3] = 0, 0
    found = neighbour_alignment(writers, readers)
    assert found[:2].isnan().all()
    assert found[2:4].tolist() == [0, 0]
    assert float(found[4]) == pytest.approx(float(alone), abs=TOLERANCE)


def test_bfloat16_is_measured_as_float32() -> None:
    torch.manual_seed(4)
    writer, reader = torch.randn(12, 8).bfloat16(), torch.randn(9, 12).bfloat16()
    assert torch.equal(
        neighbour_alignment(writer, reader), neighbour_alignment(writer.float(), reader.float())
    )


def test_the_neighbours_of_gpt2_are_those_along_the_residual_stream() -> None:
    views = select_matrices(gpt2(num_layers=2)).matrices
    h0, h1 = "transformer.h.0", "transformer.h.1"
    assert residual_neighbours(views) == (
        Neighbours(f"{h0}.attn.c_proj.weight", f"{h0}.mlp.c_fc.weight"),
        Neighbours(f"{h0}.mlp.c_proj.weight", f"{h1}.attn.c_attn.weight[q]"),
        Neighbours(f"{h0}.mlp.c_proj.weight", f"{h1}.attn.c_attn.weight[k]"),
        Neighbours(f"{h0}.mlp.c_proj.weight", f"{h1}.attn.c_attn.weight[v]"),
        Neighbours(f"{h1}.attn.c_proj.weight", f"{h1}.mlp.c_fc.weight"),
    )


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_every_pair_of_a_model_is_measured(make: type) -> None:
    torch.manual_seed(2)
    model = make()
    views = select_matrices(model).matrices
    parameters = named_parameters_canonical(model)
    measured = measure_alignments(views, parameters, BACKEND)
    assert tuple(measured) == residual_neighbours(views) != ()
    matrices = {view.name: view.read(parameters[view.parameter_name]) for view in views}
    for pair, found in measured.items():
        expected = oracle(matrices[pair.writer], matrices[pair.reader])
        assert found == pytest.approx(expected, abs=TOLERANCE)


def test_without_a_next_reader_nothing_is_measured() -> None:
    assert measure_alignments((), {}, BACKEND) == {}
