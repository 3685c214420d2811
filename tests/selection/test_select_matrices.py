from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import BY_NAME
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_pss.errors import ConfigurationError, SelectionError
from hf_pss.models.selection import named_parameters_canonical, select_matrices


def gpt2() -> nn.Module:
    return BY_NAME["gpt2"].build()


def names(model: nn.Module, **options: object) -> list[str]:
    return [matrix.name for matrix in select_matrices(model, **options).matrices]  # type: ignore[arg-type]


def reasons(model: nn.Module, **options: object) -> dict[str, str]:
    selection = select_matrices(model, **options)  # type: ignore[arg-type]
    return {e.parameter_name: e.reason for e in selection.exclusions}


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width)
        self.mlp = MLP(width)


class NanoGPT(nn.Module):
    """The layout of nanoGPT: a ModuleDict with the stack `h`, and a tied head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(16, 8),
                "h": nn.ModuleList([Block(8) for _ in range(2)]),
                "ln_f": nn.LayerNorm(8),
            }
        )
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]


def test_nanogpt() -> None:
    selection = select_matrices(NanoGPT())
    assert [m.name for m in selection.matrices if m.block == "transformer.h.1"] == [
        "transformer.h.1.attn.c_attn.weight[q]",
        "transformer.h.1.attn.c_attn.weight[k]",
        "transformer.h.1.attn.c_attn.weight[v]",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_proj.weight",
    ]
    assert len(selection.matrices) == 12
    tied = {e.parameter_name: e.reason for e in selection.exclusions}
    assert tied["lm_head.weight"] == "tied to transformer.wte.weight"


def test_a_sequential_that_repeats_a_class_is_a_stack() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(16, 8), *layers, nn.Linear(8, 16))
    selection = select_matrices(model)
    assert {m.block for m in selection.matrices} == {"1", "2"}
    assert len(selection.matrices) == 12
    assert reasons(model)["3.weight"] == "outside the repeated blocks"


def test_a_list_of_plain_linears_is_not_a_stack_of_blocks() -> None:
    model = nn.ModuleDict(
        {"h": nn.ModuleList([Block(8)]), "heads": nn.ModuleList([nn.Linear(8, 4)] * 2)}
    )
    assert reasons(model)["heads.0.weight"] == "outside the repeated blocks"


def test_blocks_shared_between_depths_are_selected_once() -> None:
    block = Block(8)
    assert names(nn.ModuleDict({"h": nn.ModuleList([block, block])})) == names(
        nn.ModuleDict({"h": nn.ModuleList([block])})
    )


def test_a_fused_projection_of_unknown_layout_stays_whole_with_a_note() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Linear(8, 24)

    block = nn.ModuleDict({"attn": Attention()})
    (matrix,) = select_matrices(nn.ModuleList([block])).matrices
    assert matrix.rows is None
    assert matrix.shape == (24, 8)
    assert matrix.reason == "Linear; fused, layout unknown: kept as one matrix"


def test_a_known_class_of_unexpected_size_stays_whole() -> None:
    block = Block(8)
    block.attn.c_attn = nn.Linear(8, 25)
    matrices = {m.name: m for m in select_matrices(nn.ModuleList([block])).matrices}
    assert matrices["0.attn.c_attn.weight"].reason.endswith("kept as one matrix")


def test_a_linear_tied_to_an_embedding_is_not_selected() -> None:
    block = Block(8)
    model = nn.ModuleDict({"h": nn.ModuleList([block]), "wte": nn.Embedding(8, 8)})
    model["wte"].weight = block.attn.c_proj.weight
    assert reasons(model)["h.0.attn.c_proj.weight"] == "embedding or output head"


class _Sharded:
    """Stands for the mixin of FSDP2, which derives a class from the module's own."""


def renamed_as_fsdp2_does(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        kind = type(module)
        module.__class__ = type(f"FSDP{kind.__name__}", (_Sharded, kind), {})
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    stack = model.get_submodule("transformer.h")
    for index in range(2):
        stack[index] = checkpoint_wrapper(stack[index])  # type: ignore[index, operator]
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    stack = model.get_submodule("transformer.h")
    for index in range(2):
        stack[index] = torch.compile(stack[index])  # type: ignore[index, operator]
    return model


# torch's own modules warn of torch.jit when its compiler is first imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        checkpointed,
        compiled_blocks,
        renamed_as_fsdp2_does,
        lambda model: torch.compile(nn.DataParallel(checkpointed(model))),
    ],
    ids=["parallel", "compiled", "checkpointed", "compiled-blocks", "fsdp2", "all"],
)
def test_wrappers_do_not_change_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = gpt2()
    expected = select_matrices(plain)
    parameter_names = list(named_parameters_canonical(plain))
    wrapped = wrap(plain)
    found = select_matrices(wrapped)
    assert [(m.name, m.block, m.rows) for m in found.matrices] == [
        (m.name, m.block, m.rows) for m in expected.matrices
    ]
    assert reasons(wrapped) == reasons(plain)
    assert list(named_parameters_canonical(wrapped)) == parameter_names


def test_shapes_come_from_zero3_where_parameters_are_empty() -> None:
    model = gpt2()
    expected = [(m.name, m.shape) for m in select_matrices(model).matrices]
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert [(m.name, m.shape) for m in select_matrices(model).matrices] == expected


@pytest.mark.filterwarnings("ignore")
def test_lora_factors_and_frozen_bases_stay_out() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["c_attn"], modules_to_save=["c_fc"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(gpt2(), config)
    selection = select_matrices(model)
    assert [m.name for m in selection.matrices] == [
        f"base_model.model.transformer.h.{i}.mlp.c_fc.modules_to_save.default.weight"
        for i in range(2)
    ]
    attention = "base_model.model.transformer.h.0.attn.c_attn"
    why = {e.parameter_name: e.reason for e in selection.exclusions}
    assert selection.adapters[0].name == f"{attention}[default]"
    assert f"{attention}.lora_A.default.weight" not in why
    assert why[f"{attention}.base_layer.weight"] == "frozen"
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert f"{attention}.base_layer.weight[k]" in names(model)


def test_the_error_for_a_model_with_only_adapters_names_them() -> None:
    model = gpt2().requires_grad_(False)
    with pytest.raises(SelectionError, match=r"× frozen"):
        select_matrices(model)


def test_the_error_names_the_adapters_of_a_model_that_trains_only_them() -> None:
    model = gpt2().requires_grad_(False)
    attention = model.transformer.h[0].attn
    attention.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
    with pytest.raises(SelectionError, match=r"1 × LoRA factor.*not products of two"):
        select_matrices(model)


def test_roles() -> None:
    assert {m.role for m in select_matrices(gpt2(), roles=["mlp"]).matrices} == {"mlp"}
    skipped = reasons(gpt2(), roles=["mlp"])["transformer.h.0.attn.c_proj.weight"]
    assert skipped == "role attention was not asked for"


def test_min_dim() -> None:
    few = "fewer than min_dim = 33 rows or columns"
    small = reasons(gpt2(), min_dim=33, include=["c_fc"])
    assert small["transformer.h.0.attn.c_attn.weight[q]"] == few
    assert names(gpt2(), min_dim=33, include=["h.0.mlp.c_fc"]) == [
        "transformer.h.0.mlp.c_fc.weight"
    ]


def test_exclude_leaves_one_part_of_a_projection_out() -> None:
    selection = select_matrices(gpt2(), exclude=[r"h\.0\..*\[v\]$"])
    assert len(selection.matrices) == 11
    left_out = "transformer.h.0.attn.c_attn.weight[v]"
    assert left_out not in [m.name for m in selection.matrices]
    assert reasons(gpt2(), exclude=[r"\[v\]$"])[left_out] == r"excluded by '\\[v\\]$'"


def test_exclude_takes_parameter_names_too() -> None:
    assert len(names(gpt2(), exclude=[r"c_attn\.weight$"])) == 6


def test_include_adds_what_the_rules_skip() -> None:
    selection = select_matrices(gpt2(), include=["wte"])
    wte = selection.matrices[0]
    assert (wte.name, wte.shape) == ("transformer.wte.weight", (64, 32))
    assert wte.reason == "included by 'wte': Embedding"
    assert len(selection.matrices) == 13


def test_exclude_wins_over_include() -> None:
    found = names(gpt2(), include=[r"\bw.e\b"], exclude=["wte"])
    assert found == ["transformer.wpe.weight", *names(gpt2())]


def test_include_of_a_selected_matrix_changes_nothing() -> None:
    assert select_matrices(gpt2(), include=["c_fc"]) == select_matrices(gpt2())


def test_include_reaches_across_roles() -> None:
    found = names(gpt2(), roles=["attention"], include=[r"h\.0\.mlp\.c_fc"])
    assert [n for n in found if "mlp" in n] == ["transformer.h.0.mlp.c_fc.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_close_ones(option: str) -> None:
    with pytest.raises(SelectionError, match=r"'attn.c_atn' matches no.*attn\.c_attn\.weight"):
        select_matrices(gpt2(), **{option: ["attn.c_atn"]})  # type: ignore[arg-type]


def test_a_pattern_without_close_names_gets_an_example() -> None:
    with pytest.raises(SelectionError, match=r"A name there is transformer\.h\.0"):
        select_matrices(gpt2(), exclude=["zzzzzz"])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_an_invalid_expression_is_named(option: str) -> None:
    with pytest.raises(SelectionError, match=r"'h\.\(' is not a regular expression.*backslash"):
        select_matrices(gpt2(), **{option: ["h.("]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("ln_f", "bias, norm or scale"), ("lm_head", "tied to transformer.wte.weight")],
)
def test_an_include_of_an_impossible_parameter_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(SelectionError, match=f"nothing that can be selected: .*{reason}"):
        select_matrices(gpt2(), include=[pattern])


@pytest.mark.parametrize(
    "options",
    [{"roles": "mlp"}, {"roles": ["router"]}, {"min_dim": 0}, {"include": "c_fc"}],
)
def test_options_without_a_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"pass|write"):
        select_matrices(gpt2(), **options)  # type: ignore[arg-type]


def test_the_error_without_any_matrix_has_reasons_and_advice() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(SelectionError, match=r"2 × outside the repeated blocks.*include="):
        select_matrices(model)
    assert names(model, include=["weight"]) == ["0.weight", "2.weight"]


def test_complex_weights_are_left_alone() -> None:
    block = Block(8)
    block.mlp.c_fc.weight = nn.Parameter(torch.zeros(32, 8, dtype=torch.complex64))
    why = reasons(nn.ModuleList([block]))
    assert why["0.mlp.c_fc.weight"] == "torch.complex64, not real floating point"


def test_the_table_is_aligned_and_folds_blocks_of_exclusions() -> None:
    table = select_matrices(gpt2()).table()
    lines = table.splitlines()
    assert lines[0].split() == ["name", "shape", "role", "reason"]
    column = lines[0].index("shape")
    assert all(line[column - 1] == " " != line[column] for line in lines)
    assert "transformer.h.*.ln_1.weight" in table
    assert "(× 2)" in table
    assert len(lines) == 1 + 12 + len({line.partition(" ")[0] for line in lines[13:]})


def test_views_resolve_by_name_after_parameters_are_replaced() -> None:
    model = gpt2()
    matrix = select_matrices(model).matrices[0]
    projection = model.get_submodule("transformer.h.0.attn.c_attn")
    replaced: Tensor = torch.ones_like(projection.weight)  # type: ignore[arg-type]
    projection.weight = nn.Parameter(replaced)
    read = matrix.read(named_parameters_canonical(model)[matrix.parameter_name])
    assert torch.equal(read, torch.ones(32, 32))
