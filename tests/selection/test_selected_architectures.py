from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from tiny_models import ARCHITECTURES, BY_NAME, Architecture
from torch import nn

from hf_pss.models.selection import Selection, named_parameters_canonical, select_matrices

EACH = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


def names_by_role(selection: Selection) -> dict[str, set[str]]:
    """Return the names inside a block, without `.weight`, over all blocks."""
    names: dict[str, set[str]] = defaultdict(set)
    for matrix in selection.matrices:
        names[matrix.role].add(matrix.name.removeprefix(matrix.block + ".").replace(".weight", ""))
    return dict(names)


def test_there_are_at_least_45_architectures() -> None:
    assert len({architecture.model_type for architecture in ARCHITECTURES}) >= 45


@EACH
def test_exactly_the_expected_matrices_are_selected(architecture: Architecture) -> None:
    selection = select_matrices(architecture.build())
    assert names_by_role(selection) == architecture.expected_names()
    assert len(selection.matrices) == architecture.num_matrices
    assert len({matrix.name for matrix in selection.matrices}) == architecture.num_matrices


@EACH
def test_every_parameter_is_selected_or_excluded_with_a_reason(architecture: Architecture) -> None:
    model = architecture.build()
    selection = select_matrices(model)
    selected = {matrix.parameter_name for matrix in selection.matrices}
    excluded = {exclusion.parameter_name for exclusion in selection.exclusions}
    assert selected.isdisjoint(excluded)
    assert selected | excluded >= set(named_parameters_canonical(model))
    assert all(exclusion.reason for exclusion in selection.exclusions)


@EACH
def test_no_embedding_head_router_convolution_norm_or_bias_is_selected(
    architecture: Architecture,
) -> None:
    model = architecture.build()
    selected = {matrix.parameter_name for matrix in select_matrices(model).matrices}
    for module_name, module in model.named_modules():
        kind = type(module).__name__
        forbidden = isinstance(module, nn.Embedding | nn.modules.conv._ConvNd | nn.LayerNorm)
        forbidden |= re.search(r"Router|Gating|Norm", kind) is not None
        forbidden |= (
            re.search(r"(head|classifier|decoder|lm_head|pooler)$", module_name) is not None
        )
        for name, parameter in module.named_parameters(recurse=False):
            if forbidden or name.endswith("bias") or parameter.ndim < 2:
                assert f"{module_name}.{name}".lstrip(".") not in selected


@EACH
def test_views_of_a_parameter_are_disjoint_and_cover_it(architecture: Architecture) -> None:
    model = architecture.build()
    parameters = named_parameters_canonical(model)
    read: dict[str, list[torch.Tensor]] = defaultdict(list)
    for matrix in select_matrices(model).matrices:
        shape = parameters[matrix.parameter_name].shape
        numbered = torch.arange(shape.numel()).reshape(shape)
        values = matrix.read(numbered)
        assert tuple(values.shape) == matrix.shape
        read[matrix.parameter_name].append(values.flatten())
    for name, parts in read.items():
        everything = torch.cat(parts).sort().values
        assert torch.equal(everything, torch.arange(parameters[name].numel())), name


@EACH
def test_reading_and_writing_back_leaves_every_bit(architecture: Architecture) -> None:
    model = architecture.build().bfloat16()
    parameters = named_parameters_canonical(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for matrix in select_matrices(model).matrices:
        parameter = parameters[matrix.parameter_name]
        matrix.write_(parameter, matrix.read(parameter).float())
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


@EACH
def test_shapes_are_outputs_by_inputs(architecture: Architecture) -> None:
    """The first matrices of an MLP have as many inputs as its last one has outputs."""
    model = architecture.build()
    by_name = {matrix.name: matrix for matrix in select_matrices(model).matrices}
    last = re.compile(r"(down_proj|c_proj|fc2|fc_out|dense_4h_to_h|wo|Wo|lin2|w2)(\.weight)?$")
    widths = {m.shape[-2] for m in by_name.values() if m.role == "mlp" and last.search(m.name)}
    assert widths <= {32}


def test_models_with_only_state_space_mixers_are_refused_with_reasons() -> None:
    mamba = Architecture(
        "mamba",
        "AutoModelForCausalLM",
        "mamba",
        "|",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
    )
    model = mamba.build()
    with pytest.raises(ValueError, match="state-space or convolutional mixer") as raised:
        select_matrices(model)
    assert "include=" in str(raised.value)
    included = select_matrices(model, include=[r"mixer\.in_proj\.weight"])
    assert [m.role for m in included.matrices] == ["mlp", "mlp"]


def test_the_reason_of_a_tied_head_names_its_partner() -> None:
    reasons = {
        e.parameter_name: e.reason for e in select_matrices(BY_NAME["gpt2"].build()).exclusions
    }
    assert reasons["lm_head.weight"] == "tied to transformer.wte.weight"
    assert reasons["transformer.wte.weight"] == "embedding or output head"
    assert reasons["transformer.h.0.ln_1.weight"] == "bias, norm or scale"


@pytest.mark.parametrize(
    ("name", "parameter_name", "reason"),
    [
        ("bert-classifier", "classifier.weight", "outside the repeated blocks"),
        ("bert-classifier", "bert.pooler.dense.weight", "outside the repeated blocks"),
        ("llama", "lm_head.weight", "embedding or output head"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "router"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", "bias, norm or scale"),
        ("jamba", "model.layers.0.mamba.in_proj.weight", "state-space or convolutional mixer"),
        ("qwen3_next", "model.layers.0.linear_attn.conv1d.weight", "convolution"),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", "convolution"),
        ("whisper", "model.encoder.embed_positions.weight", "frozen"),
    ],
)
def test_reasons_of_exclusions(name: str, parameter_name: str, reason: str) -> None:
    exclusions = select_matrices(BY_NAME[name].build()).exclusions
    assert {e.parameter_name: e.reason for e in exclusions}[parameter_name] == reason


def test_the_reason_names_unusual_storage() -> None:
    gpt2 = {m.name: m for m in select_matrices(BY_NAME["gpt2"].build()).matrices}
    q = gpt2["transformer.h.0.attn.c_attn.weight[q]"]
    assert q.transposed
    assert q.reason == "Conv1D, stored (in, out); q of [q 32 | k 32 | v 32]"
    llama4 = {m.name: m for m in select_matrices(BY_NAME["llama4_text"].build()).matrices}
    down = llama4["model.layers.1.feed_forward.experts.down_proj"]
    assert down.transposed
    assert down.shape == (4, 32, 48)
    assert down.reason == "Llama4TextExperts, a stack of 4, stored (in, out)"
    neox = {m.name: m for m in select_matrices(BY_NAME["gpt_neox"].build()).matrices}
    k = neox["gpt_neox.layers.0.attention.query_key_value.weight[k]"]
    assert k.reason == "Linear; k of 4 × [q 8 | k 8 | v 8]"
