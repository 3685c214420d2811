"""Heads inside blocks, shared matrices, and the layers beside attention and MLP."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import ARCHITECTURES, BY_NAME, Architecture
from torch import nn

from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.selection.by_name import why_no_block_matrix
from hf_pss.optim import build_optimizer

WIDTH, WORDS = 32, 512


class Block(nn.Module):
    def __init__(self, num_hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, num_hidden)
        self.down = nn.Linear(num_hidden, WIDTH)


class PredictionModule(nn.Module):
    """Predicts one more token, like DeepSeek-V3: a projection, a block and an output matrix."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.eh_proj = nn.Linear(2 * WIDTH, WIDTH)
        self.block = Block()
        self.tokens = output


def new_output() -> nn.Linear:
    return nn.Linear(WIDTH, WORDS, bias=False)


def language_model(**parts: nn.Module) -> nn.Module:
    blocks = nn.ModuleList([Block() for _ in range(2)])
    return nn.ModuleDict({"embed": nn.Embedding(WORDS, WIDTH), "layers": blocks, **parts})


def with_own_outputs() -> nn.Module:
    modules = nn.ModuleList([PredictionModule(new_output()) for _ in range(2)])
    return language_model(lm_head=new_output(), mtp=modules)


def with_tied_outputs(*, head_first: bool) -> nn.Module:
    head = new_output()
    parts = {"lm_head": head, "mtp": nn.ModuleList([PredictionModule(head) for _ in range(2)])}
    return language_model(**dict(sorted(parts.items(), reverse=not head_first)))


def with_medusa_heads() -> nn.Module:
    heads = [nn.Sequential(Block(), new_output()) for _ in range(2)]
    return language_model(medusa=nn.ModuleList(heads))


def reasons(model: nn.Module) -> dict[str, str]:
    return {e.parameter_name: e.reason for e in select_matrices(model).exclusions}


def selected(model: nn.Module) -> list[str]:
    return [matrix.name for matrix in select_matrices(model).matrices]


HEADS = {
    "own": (with_own_outputs, "mtp.0.tokens.weight", "output head inside a block"),
    "medusa": (with_medusa_heads, "medusa.0.1.weight", "output head inside a block"),
    "tied, the head first": (
        lambda: with_tied_outputs(head_first=True),
        "mtp.0.tokens.weight",
        "tied to lm_head.weight",
    ),
    "tied, the head last": (
        lambda: with_tied_outputs(head_first=False),
        "mtp.0.tokens.weight",
        "shared with lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_in_blocks_are_moved_by_adamw_and_never_smoothed(case: str) -> None:
    build, name, reason = HEADS[case]
    model = build()
    assert reasons(model)[name] == reason
    assert not [matrix for matrix in select_matrices(model).matrices if WORDS in matrix.shape]
    optimizer = build_optimizer(model, algo="muon", lr=1e-3)
    by_muon = {id(p) for g in optimizer.param_groups if g["algo"] == "muon" for p in g["params"]}
    names = [n for n, p in named_parameters_canonical(model).items() if id(p) in by_muon]
    assert names == selected(model)
    others = [m for m in ("layers.0", "mtp.0.block", "medusa.0.0") if f"{m}.up.weight" in names]
    assert len(others) == 2


def test_a_tied_head_can_be_included_under_its_first_name_only() -> None:
    model = with_tied_outputs(head_first=False)
    found = select_matrices(model, include=[r"mtp\.\d\.tokens"]).matrices
    assert "mtp.0.tokens.weight" in [matrix.name for matrix in found]
    assert "mtp.1.tokens.weight" not in [matrix.name for matrix in found]


@pytest.mark.parametrize("num_hidden", [WORDS, WORDS // 2])
def test_hidden_units_as_many_as_words_are_not_a_head(num_hidden: int) -> None:
    """Two linear layers, and one layer of values and gates, which are multiplied."""
    block = Block(num_hidden)
    block.up = nn.Linear(WIDTH, WORDS)
    model = nn.ModuleDict({"embed": nn.Embedding(WORDS, 8), "h": nn.ModuleList([block])})
    assert selected(model) == ["h.0.q_proj.weight", "h.0.up.weight", "h.0.down.weight"]


@pytest.mark.parametrize(("holder", "num_inputs"), [("attn", 8), ("mlp", WORDS), ("mlp", 600)])
def test_a_matrix_with_as_many_rows_as_words_is_not_a_head(holder: str, num_inputs: int) -> None:
    """Queries from fewer inputs, as in latent attention, and matrices without more outputs.

    Nothing in the block reads their outputs by its size.
    """
    part = nn.ModuleDict({"proj": nn.Linear(num_inputs, WORDS), "other": nn.Linear(700, 8)})
    blocks = nn.ModuleList([nn.ModuleDict({holder: part})])
    model = nn.ModuleDict({"embed": nn.Embedding(WORDS, WIDTH), "h": blocks})
    assert f"h.0.{holder}.proj.weight" in selected(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "architecture",
    [a for a in ARCHITECTURES if "vocab_size" in a.settings],
    ids=lambda a: a.name,
)
def test_the_number_of_words_changes_nothing_in_tiny_models(architecture: Architecture) -> None:
    """The model has as many words as hidden units (48), or as values and gates together (96)."""
    expected = selected(architecture.build())
    for num_words in (48, 96):
        settings = {**architecture.settings, "vocab_size": num_words}
        assert selected(replace(architecture, settings=settings).build()) == expected


def test_an_output_head_is_known_by_its_name_where_there_are_fewer_words_than_features() -> None:
    block = nn.ModuleDict({"up": nn.Linear(32, 48), "lm_head": nn.Linear(32, 8)})
    model = nn.ModuleDict({"embed": nn.Embedding(8, 32), "mtp": nn.ModuleList([block])})
    assert reasons(model)["mtp.0.lm_head.weight"] == "output head inside a block"


def test_a_matrix_shared_with_a_module_outside_of_all_blocks_is_left_alone() -> None:
    model = language_model(probe=nn.Linear(WIDTH, WIDTH, bias=False))
    model["probe"].weight = model["layers"][0].q_proj.weight
    assert reasons(model)["layers.0.q_proj.weight"] == "shared with probe.weight"
    assert "layers.1.q_proj.weight" in selected(model)


def test_matrices_shared_between_blocks_stay_selected() -> None:
    model = language_model()
    model["layers"][1].q_proj.weight = model["layers"][0].q_proj.weight
    assert "layers.0.q_proj.weight" in selected(model)
    assert reasons(model)["layers.1.q_proj.weight"] == "tied to layers.0.q_proj.weight"


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_block_that_also_has_a_name_of_its_own_stays_selected(*, shared_first: bool) -> None:
    """A universal transformer has one block, and a list of its uses."""
    shared = Block()
    parts = {"layers": nn.ModuleList([shared, shared]), "shared": shared}
    model = nn.ModuleDict(dict(sorted(parts.items(), reverse=shared_first)))
    name = "shared" if shared_first else "layers.0"
    assert selected(model) == [f"{name}.{part}.weight" for part in ("q_proj", "up", "down")]


MODULATION = "modulation or conditioning layer"
EMBEDDER = "timestep, position or other embedder"
HEAD = "output head inside a block"


@pytest.mark.parametrize(
    ("path", "classes", "reason"),
    [
        ("norm1.linear", "CogVideoXLayerNormZero.Linear", MODULATION),
        ("norm1_context.linear", "SD35AdaLayerNormZeroX.Linear", MODULATION),
        ("0.linear", "Qwen2_5_OmniAdaLayerNormZero_Final.Linear", MODULATION),
        ("attn_norm.linear", "Custom.Linear", MODULATION),
        ("attn.adaLN_modulation.1", "Attention.Sequential.Linear", MODULATION),
        ("img_mod.lin", "Modulation.Linear", MODULATION),
        ("film.scale_bias", "T5FiLMLayer.Linear", MODULATION),
        ("cond_proj", "Linear", MODULATION),
        ("1.mapper_sca", "SDCascadeTimestepBlock.Linear", MODULATION),
        ("ada_rms_norm.linear1", "VoxtralRealtimeTextAdaRmsNorm.Linear", MODULATION),
        ("norm1.emb.timestep_embedder.linear_1", "A.B.TimestepEmbedding.Linear", EMBEDDER),
        ("resnets.0.time_emb_proj", "ModuleList.ResnetBlock2D.Linear", EMBEDDER),
        ("t_embedder.mlp.0", "TimestepEmbedder.Sequential.Linear", EMBEDDER),
        ("attn.cpb_mlp.fc1", "WindowAttention.Mlp.Linear", EMBEDDER),
        ("attn.rel_pos.mlp.fc1", "RelPosAttention.RelPosMlp.Mlp.Linear", EMBEDDER),
        ("shared_head.head", "SharedHead.Linear", HEAD),
        ("0.out", "MedusaHead.Linear", HEAD),
        # What only looks like one of these.
        ("norm_attn_norm.attn.Wqkv", "DbrxNormAttentionNorm.DbrxAttention.Linear", None),
        ("pre_norm.fn.net.0", "PreNorm.FeedForward.Sequential.Linear", None),
        ("attention.output", "RobertaPreLayerNormAttention.RobertaPreLayerNormOutput", None),
        ("mlp.ln1.linear", "LevitMlp.LinearNorm.Linear", None),
        ("modulation.projection_in", "FocalNetModulation.Linear", None),
        ("attn.pos_key_proj", "DisentangledSelfAttention.Linear", None),
        ("self_attn.q_proj", "JinaEmbeddingsV3Attention.Linear", None),
        ("patch_embed.attn.qkv", "PatchEmbed.Custom.Linear", None),
        ("heads.0.key", "ModuleList.Head.Linear", None),
        ("temporal_dense", "Linear", None),
        ("kv_mapper.1", "Sequential.Linear", None),
        ("multi_modal_mlp.fc1", "Xmod.Linear", None),
    ],
)
def test_the_purpose_of_a_layer_by_its_names(path: str, classes: str, reason: str | None) -> None:
    steps = list(zip(path.split("."), classes.split("."), strict=True))
    assert why_no_block_matrix(reversed(steps)) == reason


def test_an_albert_layer_is_selected_once_for_all_its_uses() -> None:
    assert len(selected(BY_NAME["albert"].build())) == 6
