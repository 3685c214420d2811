"""Grid files: the cells that they produce, and the errors of invalid ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_cells import cell

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.grid import Cell, read_grid
from hf_pss.evidence.guards import GUARDS, make_guard
from hf_pss.evidence.recipes import RECIPES

BASE = "recipes: [wide]\nlearning_rates: [1e-3]\nguards: [none]\n"
RECIPES_FOLDER = Path(__file__).parents[2] / "recipes" / "lr_sweep"

OLD_IDS = ["f22a6397b14ebf86", "a9ad5eb431254684", "cb4b2745572f5e61"]
OPTIONED = (
    *("zclip", "zclip, z_thresh: 3.0", "msign", "msign, every_steps: 20", "floor_first"),
    *("floor_first, steps: 9", "floor_first, steps: 9, floor_ratio: 0.5"),
)

Cells = Callable[[str], list[Cell]]


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    def read(text: str) -> list[Cell]:
        path = tmp_path / "grid.yaml"
        path.write_text(text, encoding="utf-8")
        return read_grid(path)

    return read


def test_a_number_without_a_dot_is_a_number(cells: Cells) -> None:
    (only,) = cells(BASE)
    assert only.learning_rate == 1e-3
    assert only.recipe.learning_rate == 1e-3


def test_a_block_is_the_full_product_seeds_outermost(cells: Cells) -> None:
    found = cells(
        "recipes: [wide, deep]\nlearning_rates: [1e-3, 1e-2]\nguards: [none, clip]\nseeds: 2\n"
        "optimizers: [adamw, sgd]"
    )
    assert len(found) == len({c.id for c in found}) == 2 * 2 * 2 * 2 * 2
    assert [c.seed for c in found] == [0] * 16 + [1] * 16


def test_seeds_are_a_count_or_a_list(cells: Cells) -> None:
    assert [c.seed for c in cells(BASE + "seeds: 3")] == [0, 1, 2]
    assert [c.seed for c in cells(BASE + "seeds: [7, 5]")] == [5, 7]


def test_cells_that_blocks_share_are_run_once(cells: Cells) -> None:
    blocks = (
        "- {recipes: [wide], learning_rates: [1e-3], guards: [none, clip]}\n"
        "- {recipes: [wide], learning_rates: [0.001, 0.002], guards: [clip]}"
    )
    found = {(c.guard_name, c.learning_rate) for c in cells(blocks)}
    assert len(cells(blocks)) == len(found) == 3


def test_changes_reach_the_training_and_the_recipe(cells: Cells) -> None:
    (only,) = cells(BASE + "changes: {num_layers: 1, init_gain: 4.0}")
    assert only.recipe.num_layers == 1
    assert only.recipe.init_gain == 4.0
    assert RECIPES["wide"].num_layers == 6


def test_pss_with_options_of_its_own(cells: Cells) -> None:
    mine = "{name: mine, preset: floor, floor_ratio: 0.5}"
    (only,) = cells(BASE.replace("[none]", f"[{mine}]"))
    assert only.guard_name == "mine"
    assert only.guard.pss.floor_ratio == 0.5


def test_a_guard_of_the_table_with_options_of_its_own(cells: Cells) -> None:
    mine = "{name: first_9, guard: floor_first, steps: 9, floor_ratio: 0.5}"
    (only,) = cells(BASE.replace("[none]", f"[{mine}]"))
    assert only.guard_name == "first_9"
    assert only.guard.pss.floor_ratio == 0.5
    assert "first 9 steps" in only.guard.description
    assert "first 9 steps" in pickle.loads(pickle.dumps(only)).guard.description


def test_an_option_is_a_number_without_its_dot_and_a_default_is_no_change() -> None:
    given = make_guard("zclip", {"z_thresh": "3e0", "alpha": 0.97})
    assert given.options == {"z_thresh": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red\n" + BASE, "no key colour; it has recipes"),
        (BASE.replace("wide", "huge"), "'huge'; choose one of slow_damage"),
        (BASE.replace("none", "prayer"), "'prayer'; choose one of none"),
        (BASE + "optimizers: [adam]", "'adam'; choose one of adamw"),
        (BASE + "changes: {depth: 3}", "no depth; it has"),
        (BASE + "changes: {num_layers: 0}", "num_layers must be above 0"),
        (BASE + "changes: [1]", "is a mapping"),
        ("recipes: [wide]\nguards: [none]", "lacks learning_rates"),
        (BASE.replace("[1e-3]", "[fast]"), "'fast'"),
        (BASE.replace("[1e-3]", "1e-3"), "`learning_rates` of a grid is a list"),
        (BASE.replace("[1e-3]", "[]"), "`learning_rates` of a grid is a list"),
        (BASE + "seeds: 0", "how many, or a list of whole numbers"),
        (BASE + "seeds: [a]", "how many, or a list of whole numbers"),
        (BASE + "seeds: [0.5]", "how many, or a list of whole numbers"),
        (BASE.replace("[none]", "[{preset: floor}]"), "a mapping with a name"),
        (BASE.replace("[none]", "[{name: clip}]"), "give yours another name"),
        (BASE.replace("[none]", "[{name: mine, preset: best}]"), "paper"),
        (BASE.replace("[none]", "[{name: mine, floor: 2}]"), "floor"),
        (BASE.replace("[none]", "[{name: a, guard: zclips}]"), "'zclips'; choose one of none"),
        (BASE.replace("[none]", "[{name: a, guard: zclip, z: 3}]"), "z_thresh, alpha, calib"),
        (BASE.replace("[none]", "[{name: a, guard: msign, every_steps: 0}]"), "whole number above"),
        (BASE.replace("[none]", "[{name: a, guard: msign, every_steps: 2.5}]"), "gave 2.5"),
        (BASE.replace("[none]", "[{name: a, guard: zclip, z_thresh: true}]"), "gave True"),
        (BASE.replace("[none]", "[{name: a, guard: zclip, z_thresh: x}]"), "gave 'x'"),
        (
            BASE.replace("[none]", "[{name: a, guard: floor_first, floor: 2}]"),
            "no option floor. Did you",
        ),
        ("[]", "holds no run"),
        ("", "is a mapping"),
        ("just words", "is a mapping"),
        ("{: [", "cannot be read"),
    ],
)
def test_an_error_names_the_mistake_and_the_choices(cells: Cells, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        cells(text)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml cannot be read"):
        read_grid(tmp_path / "absent.yaml")


def test_an_id_is_a_function_of_the_cell() -> None:
    assert cell().id == cell().id
    assert pickle.loads(pickle.dumps(cell())).id == cell().id


def test_a_guard_with_default_options_keeps_the_id_of_old_rows() -> None:
    assert [cell(name).id for name in ("zclip", "floor", "spectral_cap")] == OLD_IDS


def test_whatever_changes_the_run_changes_its_id(cells: Cells) -> None:
    mine = "{{name: mine, preset: floor, floor_ratio: {}}}"
    texts = [
        BASE,
        BASE + "seeds: [1]",
        BASE + "optimizers: [sgd]",
        BASE + "changes: {num_layers: 1}",
        BASE + "changes: {init_gain: 2.0}",
        BASE + "probes_every_steps: 5",
        BASE.replace("1e-3", "2e-3"),
        BASE.replace("wide", "deep"),
        BASE.replace("none", "clip"),
        *(BASE.replace("[none]", f"[{mine.format(ratio)}]") for ratio in (0.5, 0.6)),
        *(BASE.replace("[none]", f"[{{name: mine, guard: {guard}}}]") for guard in OPTIONED),
    ]
    found = [cells(text)[0].id for text in texts]
    assert len(set(found)) == len(texts)


@pytest.mark.parametrize("guard", list(GUARDS))
def test_cells_go_to_another_process(guard: str) -> None:
    before = cell(guard)
    after = pickle.loads(pickle.dumps(before))
    assert after == before
    assert after.guard.description == make_guard(guard).description


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_grids_that_are_shipped_can_be_read(path: Path) -> None:
    assert read_grid(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("[wide]", "[[wide]]"), "asks for the recipe"),
        (BASE + "1: 2\n", "no key 1"),
        (BASE + "changes: {weight_decay: 1e-1}", "needs its dot"),
        (BASE + "changes: {architecture: foo}", "gpt2 or post_ln or llama"),
        (BASE + "changes: {corpus: french}", "python or english or cpp or digits"),
        (BASE + "changes: {corpus: digits}", "gpt2 cannot learn from digits"),
        (BASE + "changes: {architecture: vit}", "vit cannot learn from python"),
        (BASE + "changes: {architecture: llama, zero_query: true}", "not llama"),
        (
            BASE.replace("wide", "random_batch") + "changes: {architecture: vit, corpus: digits}",
            "no tokens for random_batch",
        ),
        (BASE + "changes: {dtype: float16}", "float32 or bfloat16"),
        (BASE + "changes: {warmup_steps: -1}", "0 or more"),
        (BASE + "changes: {schedule: step}", "warmup_stable_decay or constant or ramp or cosine"),
        (BASE + "changes: {num_steps: true}", "is like 800"),
        (BASE + "changes: {learning_rate: 1.0}", "an axis"),
        (BASE + "probes_every_steps: -1", "is a count"),
        (BASE + "seeds: [-1]", "whole numbers"),
        (BASE.replace("1e-3", "-1e-3"), "above 0"),
        (BASE.replace("none", "rescue_reset"), "has none"),
        (BASE.replace("none", "adagc") + "optimizers: [sgd]", "in AdamW's place"),
        (
            "- {recipes: [wide], learning_rates: [1e-3], guards: [{name: a, floor_ratio: 0.5, "
            "preset: floor}]}\n- {recipes: [wide], learning_rates: [1e-3], guards: [{name: a}]}",
            "two sets of options",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_read(
    cells: Cells, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        [cell.check() for cell in cells(text)]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_grid(tmp_path / "grid.yaml")
