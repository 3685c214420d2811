from __future__ import annotations

import pytest
import torch

from hf_pss.errors import SelectionError
from hf_pss.models.selection import MatrixView, RowPattern

HEADS = RowPattern(start=2, size=2, period=6)  # keys of two heads of width 2: rows 2, 3, 8, 9


def view(
    shape: tuple[int, ...], rows: RowPattern | None = None, *, transposed: bool = False
) -> MatrixView:
    return MatrixView("w[k]", "w", "attention", "h.0", shape, transposed, rows, "")


def test_rows_in_runs_are_gathered_in_stored_order() -> None:
    stored = torch.arange(36).reshape(12, 3)
    assert torch.equal(view((4, 3), HEADS).read(stored), stored[[2, 3, 8, 9]])


def test_transposed_storage_is_read_as_outputs_by_inputs() -> None:
    stored = torch.arange(36).reshape(3, 12)
    assert torch.equal(view((4, 3), HEADS, transposed=True).read(stored), stored.T[[2, 3, 8, 9]])


def test_stacks_are_read_expert_by_expert() -> None:
    stored = torch.arange(72).reshape(2, 3, 12)
    ups = view((2, 6, 3), RowPattern(1, 1, 2), transposed=True)
    assert torch.equal(ups.read(stored), stored.mT[:, 1::2])


@pytest.mark.parametrize(
    ("rows", "shape", "shares"),
    [
        (None, (12, 3), True),
        (RowPattern(4, 4, 12), (4, 3), True),
        (RowPattern(1, 1, 2), (6, 3), True),
        (HEADS, (4, 3), False),
    ],
)
def test_evenly_spaced_rows_share_memory(
    rows: RowPattern | None, shape: tuple[int, ...], shares: bool
) -> None:
    stored = torch.zeros(12, 3)
    read = view(shape, rows).read(stored)
    assert (read.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()) == shares


@pytest.mark.parametrize("transposed", [False, True])
def test_writing_changes_the_matrix_and_nothing_beside_it(transposed: bool) -> None:
    stored = torch.zeros(3, 12) if transposed else torch.zeros(12, 3)
    view((4, 3), HEADS, transposed=transposed).write_(stored, torch.ones(4, 3))
    rows = stored.T if transposed else stored
    assert rows.sum(-1).tolist() == [0, 0, 3, 3, 0, 0, 0, 0, 3, 3, 0, 0]


def test_writing_casts_to_the_dtype_of_the_parameter_and_records_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.zeros(12, 3, dtype=torch.bfloat16))
    matrix = torch.full((4, 3), 1.001, requires_grad=True)
    view((4, 3), HEADS).write_(parameter, matrix)
    assert parameter.is_leaf
    assert parameter.dtype == torch.bfloat16
    assert view((4, 3), HEADS).read(parameter).tolist() == [[1.0] * 3] * 4


def test_reading_is_outside_of_the_graph() -> None:
    parameter = torch.nn.Parameter(torch.zeros(12, 3))
    assert not view((4, 3), HEADS).read(parameter).requires_grad


def test_a_shard_is_refused() -> None:
    with pytest.raises(
        SelectionError, match=r"shape \(12, 3\).*\(6, 3\).*gathered from its shards"
    ):
        view((4, 3), HEADS).read(torch.zeros(6, 3))


def test_a_matrix_of_another_shape_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"\(4, 3\).*\(3, 4\)"):
        view((4, 3), HEADS).write_(torch.zeros(12, 3), torch.zeros(3, 4))
