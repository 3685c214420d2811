"""A run and `rescue --write` smooth the same matrices of every architecture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, BY_NAME, Architecture

from hf_pss.inspection.matrices import find_matrices
from hf_pss.models.selection import select_matrices
from hf_pss.models.selection.by_name import place_of
from hf_pss.rescue.smoothed_weights import matrices_to_smooth
from hf_pss.runs.safetensors_files import open_checkpoint

# transformers saves the tensors of these models under other names than the model has.
RENAMED = {"vit", "dinov2", "beit"}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_a_checkpoint_and_its_model_have_the_same_matrices(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = architecture.build()
    model.save_pretrained(tmp_path)
    views = select_matrices(model).matrices
    found = matrices_to_smooth(open_checkpoint(tmp_path))
    # Files hold experts one by one where the model stacks them, so the weights are counted.
    assert sum(math.prod(one.shape) * (one.num_experts or 1) for one in found) == sum(
        math.prod(view.shape) for view in views
    )
    if architecture.name not in RENAMED and not any("expert" in view.name for view in views):
        assert {place_of(one.name).kind for one in found} == {
            place_of(view.name).kind for view in views
        }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nemotron_h", "mixer.in_proj"),
        ("lfm2", "conv.in_proj"),
        ("dbrx", "ffn.experts.mlp.w1"),
    ],
)
def test_mixers_and_flattened_experts_are_measured_but_not_smoothed(
    name: str, kind: str, tmp_path: Path
) -> None:
    BY_NAME[name].build().save_pretrained(tmp_path)
    matrices = find_matrices(open_checkpoint(tmp_path)).matrices
    passed_over = {one.place.kind for one in matrices if one.why_unselected}
    assert kind in passed_over


def test_an_output_head_inside_a_block_is_not_smoothed(tmp_path: Path) -> None:
    tensors = {
        "embed.weight": torch.randn(50, 4),
        "layers.0.up.weight": torch.randn(16, 4),
        "layers.0.down.weight": torch.randn(4, 16),
        "layers.0.tokens.weight": torch.randn(50, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = matrices_to_smooth(open_checkpoint(tmp_path))
    assert {one.name for one in found} == {"layers.0.up.weight", "layers.0.down.weight"}
