"""Every architecture trains, with matrices that PSS finds and sizes that compare."""

from __future__ import annotations

from multiprocessing import current_process

import pytest
import torch
from small_library import use_small_library
from sweep_cells import TINY, cell

from hf_pss.evidence.architectures import ARCHITECTURES, ModelSizes
from hf_pss.evidence.examples import examples_of
from hf_pss.evidence.recipes import RECIPES, Recipe
from hf_pss.evidence.worker import run_cell
from hf_pss.models.selection import named_parameters_canonical, select_matrices

SIZES = ModelSizes(num_layers=2, width=48, num_heads=4, context_length=16, vocab_size=300)
NUM_EXPERTS = 4


def recipe_of(architecture: str) -> Recipe:
    corpus = "digits" if architecture == "vit" else "python"
    changes = {**TINY, "architecture": architecture, "corpus": corpus}
    return RECIPES["slow_damage_tiny"].with_changes(changes)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_block_matrices_hold_twelve_times_the_squared_width(name: str) -> None:
    model = ARCHITECTURES[name](SIZES)
    parameters = named_parameters_canonical(model)
    found = {view.parameter_name for view in select_matrices(model).matrices}
    num = sum(parameters[name].numel() for name in found) / SIZES.num_layers
    mlp = 8 * SIZES.width**2
    assert num == 4 * SIZES.width**2 + (NUM_EXPERTS * mlp if name == "moe" else mlp)


def test_llama_is_tied_and_its_twin_is_not() -> None:
    tied, untied = (ARCHITECTURES[name](SIZES) for name in ("llama", "llama_untied"))
    num = SIZES.vocab_size * SIZES.width
    assert untied.num_parameters() - tied.num_parameters() == num


def test_a_gain_scales_each_block_matrix_once() -> None:
    for name in ARCHITECTURES:
        recipe = recipe_of(name)
        torch.manual_seed(0)
        plain = recipe.model()
        torch.manual_seed(0)
        larger = recipe.with_changes({"init_gain": 3.0}).model()
        found = {view.parameter_name for view in select_matrices(plain).matrices}
        for (key, one), other in zip(plain.named_parameters(), larger.parameters(), strict=True):
            assert torch.equal(other, one * (3.0 if key in found else 1.0)), (name, key)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_every_architecture_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_library(monkeypatch)
    corpus = "digits" if name == "vit" else "python"
    row = run_cell(cell("floor", architecture=name, corpus=corpus, schedule="cosine"))
    assert row.status == "finished"
    assert None not in row.losses
    assert len(row.eval_losses) == 2
    assert None not in row.eval_losses
    assert row.losses[0] == pytest.approx(2.3 if name == "vit" else 5.7, abs=0.3)


def test_masks_follow_the_seed_and_validation_masks_are_fixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_small_library(monkeypatch)
    one, same, other = (examples_of(recipe_of("bert"), seed=seed) for seed in (1, 1, 2))
    rows = [one.train[i] for i in range(32)]
    first, again, different = (e.collator(rows)["labels"] for e in (one, same, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, different)
    assert (first != -100).float().mean() == pytest.approx(0.15, abs=0.04)
    assert not torch.equal(one.collator(rows)["labels"], first)  # each batch draws new masks
    fixed = [one.validation[i] for i in range(4)]
    batch, others = one.collator(fixed), other.collator([other.validation[i] for i in range(4)])
    assert torch.equal(batch["labels"], others["labels"])
    assert torch.equal(batch["input_ids"][1], fixed[1]["input_ids"])
    assert (batch["labels"] == -100).any()


def test_masks_are_drawn_in_a_worker_and_leave_the_global_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_small_library(monkeypatch)
    monkeypatch.setattr(current_process(), "name", "SpawnProcess-1")  # as in a worker of a sweep
    examples = examples_of(recipe_of("bert"), seed=0)
    state = torch.get_rng_state()
    examples.collator([examples.train[0]])
    assert torch.equal(torch.get_rng_state(), state)
