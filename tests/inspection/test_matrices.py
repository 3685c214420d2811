from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_pss.inspection.matrices import Contents, StoredMatrix, find_matrices
from hf_pss.models.selection import select_matrices
from hf_pss.runs.safetensors_files import MatrixReader, open_checkpoint


def contents(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> Contents:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return find_matrices(open_checkpoint(folder))


def read(matrix: StoredMatrix, expert: int = 0) -> torch.Tensor:
    """Return the matrix as (outputs, inputs)."""
    whole = matrix.reader.whole(expert)
    return whole.mT if matrix.transposed else whole


def test_gpt2_is_divided_as_in_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path)
    parameters = dict(model.named_parameters())
    for with_config in (True, False):
        if not with_config:
            (tmp_path / "config.json").unlink()
        found = {one.name: one for one in find_matrices(open_checkpoint(tmp_path)).matrices}
        views = select_matrices(model).matrices
        outside = {"transformer.wte.weight", "transformer.wpe.weight"}
        assert found.keys() == {view.name for view in views} | outside
        for view in views:
            matrix = found[view.name]
            assert matrix.shape == view.shape
            assert bool((read(matrix) == view.read(parameters[view.parameter_name])).all())


LAYOUTS: list[tuple[str, tuple[int, ...], dict[str, Any], list[tuple[str, list[int]]]]] = [
    ("h.0.attn.c_attn", (12, 4), {}, [("[q]", [0, 1, 2, 3]), ("[v]", [8, 9, 10, 11])]),
    ("h.0.attn.c_attn", (12, 4), {"model_type": "gpt_bigcode"}, [("", list(range(12)))]),
    (
        "layers.0.attention.query_key_value",
        (12, 4),
        {"model_type": "gpt_neox", "num_attention_heads": 2},
        [("[q]", [0, 1, 6, 7]), ("[k]", [2, 3, 8, 9]), ("[v]", [4, 5, 10, 11])],
    ),
    ("layers.0.attention.query_key_value", (12, 4), {}, [("", list(range(12)))]),
    (
        "layers.0.self_attn.qkv_proj",
        (8, 4),
        {"model_type": "phi3", "num_attention_heads": 2, "num_key_value_heads": 1},
        [("[q]", [0, 1, 2, 3]), ("[k]", [4, 5]), ("[v]", [6, 7])],
    ),
    ("layers.0.self_attn.qkv_proj", (8, 4), {"model_type": "phi3"}, [("", list(range(8)))]),
    ("layers.0.mlp.gate_up_proj", (6, 4), {}, [("[gate]", [0, 1, 2]), ("[up]", [3, 4, 5])]),
]


@pytest.mark.parametrize(("name", "shape", "config", "parts"), LAYOUTS)
def test_fused_layouts(
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    config: dict[str, Any],
    parts: list[tuple[str, list[int]]],
) -> None:
    tensor = torch.randn(*shape)
    found = {
        one.name: one for one in contents(tmp_path, {f"{name}.weight": tensor}, config).matrices
    }
    for label, rows in parts:
        matrix = found[f"{name}.weight{label}"]
        assert bool((read(matrix) == tensor[rows]).all())
        assert matrix.shape == (len(rows), shape[1])
        assert bool(matrix.note) == (label == "")


def test_experts_are_a_stack(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, 6)
    name = "model.layers.0.mlp.experts.down_proj"
    (matrix,) = contents(tmp_path, {name: tensor}).matrices
    assert (matrix.num_experts, matrix.shape) == (3, (4, 6))
    assert bool((read(matrix, 2) == tensor[2]).all())


def test_experts_are_counted_before_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert costs a record, and a file of 100 MB could claim 25 million."""
    monkeypatch.setattr("hf_pss.inspection.matrices.MOST_EXPERTS", 5)
    stacks = {f"h.{i}.experts.w": torch.ones(3, 2, 2) for i in range(2)}
    found = contents(tmp_path, stacks | {"w": torch.ones(2, 2)})
    assert [one.name for one in found.matrices] == ["h.0.experts.w", "w"]
    assert [(one.name, why) for one, why in found.others] == [
        ("h.1.experts.w", "beyond 5 experts in all")
    ]


def test_the_rest_has_a_reason(tmp_path: Path) -> None:
    found = contents(
        tmp_path,
        {
            "norm.weight": torch.ones(4),
            "attn.bias": torch.ones(4, 4),
            "conv.weight": torch.ones(2, 2, 2, 2),
            "queries": torch.ones(2, 3, 4),
            "x.lora_A.default.weight": torch.ones(2, 4),
            "row.weight": torch.ones(1, 4),
            "none.weight": torch.ones(0, 4),
            "ids": torch.arange(4),
            "fp8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "fp8.weight_scale_inv": torch.ones(1, 1),
            "mx.weight": torch.ones(4, 4, dtype=torch.uint8),
            "mx.scale": torch.ones(4, 4).to(torch.float8_e8m0fnu),
            "w.weight": torch.ones(2, 2),
        },
    )
    assert [one.name for one in found.matrices] == ["w.weight"]
    assert {one.name: reason.split(",")[0] for one, reason in found.others} == {
        "norm.weight": "bias",
        "attn.bias": "bias",
        "conv.weight": "4-D",
        "queries": "3-D",
        "x.lora_A.default.weight": "LoRA factor: the matrix is the product",
        "row.weight": "no matrix: a side below 2",
        "none.weight": "no matrix: a side below 2",
        "fp8.weight": "quantised weights and their scales",
        "fp8.weight_scale_inv": "quantised weights and their scales",
        "mx.scale": "quantised weights and their scales",
    }
    assert {one.name for one, _ in found.unread} == {"ids", "mx.weight"}


def test_layers_beside_attention_and_mlp_are_not_judged_with_them(tmp_path: Path) -> None:
    """Inside blocks the rules are those of `select_matrices`; outside all matrices are measured."""
    names = {
        "blocks.0.attn.qkv": None,
        "blocks.0.mlp.fc1": None,
        "blocks.0.norm1.linear": "modulation or conditioning layer",
        "blocks.0.adaLN_modulation.1": "modulation or conditioning layer",
        "blocks.0.norm1.emb.timestep_embedder.linear_1": "timestep, position or other embedder",
        "layers.61.shared_head.head": "output head inside a block",
        "layers.61.embed_tokens": "timestep, position or other embedder",
        "t_embedder.mlp": None,
        "lm_head": None,
    }
    found = contents(tmp_path, {f"{name}.weight": torch.randn(5, 4) for name in names})
    measured = {one.name.removesuffix(".weight") for one in found.matrices}
    assert measured == {name for name, reason in names.items() if reason is None}
    assert {one.name.removesuffix(".weight"): reason for one, reason in found.others} == {
        name: reason for name, reason in names.items() if reason is not None
    }


def test_tables_inside_blocks_are_not_matrices(tmp_path: Path) -> None:
    names = ("layers.0.attn.relative_position_bias_table", "blocks.0.scale_shift_table")
    found = contents(tmp_path, {name: torch.randn(6, 4) for name in names})
    assert found.matrices == ()
    assert {one.name for one, _ in found.others} == set(names)


@pytest.mark.parametrize("transposed", [True, False])
def test_pieces_make_the_whole(
    tmp_path: Path, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two and of three rows cut the parts at different places."""
    shape = (4, 12) if transposed else (12, 4)
    config = {"model_type": "gpt2"} if transposed else {}
    found = contents(tmp_path, {"h.0.c_attn.weight": torch.randn(shape)}, config)
    whole = {one.name: one.reader.whole() for one in found.matrices}
    assert len(whole) == 3
    for rows in (2, 3):
        size = rows * shape[1] * 4
        monkeypatch.setattr("hf_pss.runs.safetensors_files.PIECE_BYTES", size)
        for one in found.matrices:
            assert isinstance(one.reader, MatrixReader)
            pieces = list(one.reader.pieces())
            assert max(map(len, pieces)) <= rows
            assert bool((torch.cat(pieces) == whole[one.name]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_strips_make_the_transpose(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = torch.randn(2, 3, 100).to(dtype)
    tensors = {"h.0.experts.w": stack, "h.0.gate_up_proj.weight": torch.randn(6, 100).to(dtype)}
    found = {one.name: one.reader for one in contents(tmp_path, tensors).matrices}
    monkeypatch.setattr("hf_pss.runs.safetensors_files.PIECE_BYTES", 7 * 3 * 4)  # 7 columns
    for reader, expert in ((found["h.0.experts.w"], 1), (found["h.0.gate_up_proj.weight[up]"], 0)):
        pieces, num_columns = reader.tall_pieces(expert)
        assert (num_columns, max(map(len, pieces()))) == (3, 7)
        assert bool((torch.cat([*pieces()]) == reader.whole(expert).mT).all())
