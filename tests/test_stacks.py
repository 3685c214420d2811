"""Stacks: every selected matrix is read as it is stored, and written where it came from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_pss.models.batching as stacks_module
from hf_pss.models.batching import matrix_names, matrix_shapes, stacks, write_stack_
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, RowPattern

VIEWS = (
    MatrixView("qkv[q]", "qkv", "attention", "h", (4, 4), True, RowPattern(0, 4, 12), ""),
    MatrixView("qkv[v]", "qkv", "attention", "h", (4, 4), True, RowPattern(8, 4, 12), ""),
    MatrixView("experts", "experts", "mlp", "h", (3, 4, 4), False, None, ""),
    MatrixView("out", "out", "mlp", "h", (2, 4), False, None, ""),
    MatrixView("half", "half", "mlp", "h", (4, 4), False, None, ""),
)
BACKEND = Backend()


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "qkv": nn.Parameter(torch.randn(4, 12)),
        "experts": nn.Parameter(torch.randn(3, 4, 4)),
        "out": nn.Parameter(torch.randn(2, 4)),
        "half": nn.Parameter(torch.randn(4, 4).bfloat16()),
    }


def test_every_matrix_has_a_name_and_a_shape() -> None:
    names = ("qkv[q]", "qkv[v]", "experts[0]", "experts[1]", "experts[2]", "out", "half")
    assert matrix_names(VIEWS) == names
    assert matrix_shapes(VIEWS) == {name: (2, 4) if name == "out" else (4, 4) for name in names}


def test_equal_shapes_of_one_dtype_share_a_stack(parameters: dict[str, nn.Parameter]) -> None:
    found = {s.names: s.matrices for s in stacks(VIEWS, parameters, BACKEND)}
    assert list(found) == [
        ("qkv[q]", "qkv[v]", "experts[0]", "experts[1]", "experts[2]"),
        ("out",),
        ("half",),
    ]
    square = found["qkv[q]", "qkv[v]", "experts[0]", "experts[1]", "experts[2]"]
    assert torch.equal(square[0], parameters["qkv"][:, 0:4].T)
    assert torch.equal(square[1], parameters["qkv"][:, 8:12].T)
    assert torch.equal(square[2:], parameters["experts"])
    assert found["half",].dtype is torch.bfloat16


def test_a_stack_never_exceeds_its_memory(
    parameters: dict[str, nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks_module, "_MAX_ELEMENTS", 40)  # two 4×4 matrices
    found = [stack.names for stack in stacks(VIEWS, parameters, BACKEND)]
    assert found[:3] == [("qkv[q]", "qkv[v]"), ("experts[0]", "experts[1]"), ("experts[2]",)]


def test_only_changed_matrices_are_written(parameters: dict[str, nn.Parameter]) -> None:
    before = {name: p.detach().clone() for name, p in parameters.items()}
    stack = next(iter(stacks(VIEWS, parameters, BACKEND)))
    changed = [False, True, False, True, False]
    write_stack_(stack, torch.full_like(stack.matrices, 7.0), changed, parameters, BACKEND)
    expected = {name: value.clone() for name, value in before.items()}
    expected["qkv"][:, 8:12] = 7.0
    expected["experts"][1] = 7.0
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
