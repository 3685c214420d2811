"""Pages made from rows: known answers, the committed page, and numbers that no row gave."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sweep_rows import grid_of_rows, row

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.pages import ROWS_FOLDER, Runs, render_page, write_page
from hf_pss.evidence.rows import Row, append_row, merge_summaries, read_rows, versions

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docs/evidence/README.md.j2"
MEASURED = ("docs/evidence/README.md", "docs/experiments.md")
GRIDS = ("horizon", "llama", "method", "explosions_long", "healthy", "trained", "sizes")
# A loss has two decimals or more. The number of a paper has more digits before the point.
LOSS = re.compile(r"(?<![\d.])\d{1,2}\.\d{2,}(?!\d|\.\d)")
# Two versions, the width of the anchor's band, and a bound that tests/test_floor.py checks.
NOT_LOSSES = {"3.11", "2.13", "1.05", "0.98"}


def runs_of(*rows: Row) -> Runs:
    return Runs.of(rows or grid_of_rows())


def page_of(folder: Path, template: str, rows: list[Row] | None = None) -> Path:
    """Write a template, and the rows of a file `name` beside it; return the template."""
    path = folder / "page.md.j2"
    path.write_text(template, encoding="utf-8")
    merge_summaries(folder / ROWS_FOLDER / "name.jsonl", grid_of_rows() if rows is None else rows)
    return path


def description(png: Path) -> str:
    with Image.open(png) as image:
        return str(image.info["Description"])


# --- the committed pages


def test_the_committed_page_is_what_its_rows_give() -> None:
    page = render_page(TEMPLATE)
    assert TEMPLATE.with_suffix("").read_text(encoding="utf-8") == page.text
    committed = {path.name: path for path in TEMPLATE.parent.glob("*.png")}
    assert committed.keys() == page.pictures.keys()
    for name, picture in page.pictures.items():
        assert description(committed[name]) == picture.digest


def test_the_template_holds_no_loss_of_its_own() -> None:
    text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    assert LOSS.findall(text) == []


@pytest.mark.parametrize("name", ["README.md", "docs/method_card.md"])
def test_every_loss_in_the_text_was_measured(name: str) -> None:
    measured = {n for page in MEASURED for n in LOSS.findall((ROOT / page).read_text())}
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    assert set(LOSS.findall(text)) - NOT_LOSSES <= measured


def test_every_section_is_shown_where_it_has_rows(tmp_path: Path) -> None:
    template = tmp_path / TEMPLATE.name
    template.write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    headings = [render_page(template).text.count("\n## ")]
    for name in GRIDS:
        named = [replace(r, recipe=f"on {name}", id=f"{name}-{r.id}") for r in grid_of_rows()]
        merge_summaries(tmp_path / ROWS_FOLDER / f"{name}.jsonl", named)
        text = render_page(template).text
        assert f"on {name}, 4 steps" in text
        headings.append(text.count("\n## "))
    # `horizon` answers three questions. `llama` and `trained` bring no heading of their own.
    assert headings == [1, 4, 4, 5, 6, 7, 7, 8]


def test_the_first_paragraph_says_where_the_default_does_not_help(tmp_path: Path) -> None:
    template = tmp_path / TEMPLATE.name
    template.write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    lost = [r for r in grid_of_rows() if r.explosion_kind is not None]
    named = [replace(r, guard="anchored", id=f"anchored-{r.id}") for r in lost]
    merge_summaries(tmp_path / ROWS_FOLDER / "explosions_long.jsonl", [*grid_of_rows(), *named])
    text = " ".join(render_page(template).text.split("\n- ")[0].split())
    assert "not save tiny, 4 steps, at a rate of 0.1**: 3 of 3 runs" in text
    assert "at a rate of 0.01" not in text


# --- what a template may ask


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda runs: runs.title, "tiny, 4 steps"),
        (lambda runs: runs.guards("clip"), ["clip", "floor"]),
        (lambda runs: runs.best(), "floor"),
        (lambda runs: runs.ties("floor"), []),
        (lambda runs: runs.seeds("floor"), 3),
        (lambda runs: runs.loss("clip"), "4.010"),
        (lambda runs: runs.rate("floor"), "0.01"),
        (lambda runs: runs.rate("clip"), "0.001 (edge)"),
        (lambda runs: runs.usable("clip"), "0.001"),
        (lambda runs: runs.usable("floor"), "0.001 to 0.01 (10×)"),
        (lambda runs: runs.gain("floor", "clip"), "−0.100 (−0.100 … −0.100), 3 of 3"),
        (lambda runs: runs.verdict("floor", "clip"), "`floor` ends 0.100 below `clip`"),
        (lambda runs: runs.verdict("clip", "floor"), "`clip` ends 0.100 above `floor`"),
        (lambda runs: runs.exploded("clip"), "3 of 9"),
        (lambda runs: runs.failed("clip", 0.1), "3 of 3"),
        (lambda runs: runs.share_failed("clip", 0.001), 0.0),
        (lambda runs: runs.rates(), [0.001, 0.01, 0.1]),
        (lambda runs: runs.cost("clip"), "0.50 %"),
    ],
)
def test_answers_for_a_sentence(ask: Callable[[Runs], Any], answer: Any) -> None:
    assert ask(runs_of()) == answer


def test_a_run_fails_if_it_learns_less_than_half_of_the_best() -> None:
    # The unigram entropy is 6, and the best run of the situation descends by 2 at another rate.
    runs = runs_of(
        row(rate=1e-3, loss=4.0), *(row(rate=1e-2, seed=s, loss=5.01 - 0.02 * s) for s in (0, 1))
    )
    assert runs.failed("clip", 1e-2) == "1 of 2"
    assert runs.exploded("clip") == "0 of 3"
    assert runs_of(row(loss=7.0)).failed("clip", 1e-3) == "1 of 1"  # nothing was learned
    with pytest.raises(ConfigurationError, match=r"no run at a rate of 0\.5"):
        runs.failed("clip", 0.5)


def test_a_verdict_needs_an_interval_without_zero() -> None:
    losses = {"clip": (4.0, 4.0, 4.0), "floor": (3.9, 4.0, 4.1), "paper": (3.9,)}
    rows = [row(g, seed=s, loss=v) for g, by in losses.items() for s, v in enumerate(by)]
    runs = runs_of(*rows)
    assert runs.verdict("floor", "clip") == "`floor` cannot be distinguished from `clip`"
    assert runs.verdict("paper", "clip") == "`paper` has too few seeds for a comparison with `clip`"
    assert runs.gain("paper", "clip") == "−0.100, 1 of 1"
    assert runs.rate("paper") == "0.001 (only)"
    assert (runs.best(), runs.ties("paper"), runs.ties("clip")) == ("paper", [], ["floor"])


def test_remedies_are_compared_with_guards_and_situations_are_not() -> None:
    rows = [
        row(id="a"),
        row(id="b", optimizer="muon"),
        row(id="c", changes={"matrix_lr_ratio": 0.25}),
        row(id="d", changes={"corpus": "english"}),
        row(id="e", num_steps=2400, changes={"num_steps": 2400}),
        row(id="f", num_steps=600, changes={"num_steps": 600}),
    ]
    here, *others = runs_of(*rows).situations()
    assert here.guards("clip") == ["clip", "clip · matrix_lr_ratio 0.25", "clip · muon"]
    titles = [runs.title for runs in others]
    assert titles == ["tiny, 600 steps", "tiny, 2,400 steps", "tiny · corpus english, 4 steps"]


def test_a_remedy_of_all_runs_belongs_to_the_situation() -> None:
    both, ratio = {"adam_beta2": 0.95}, {"adam_beta2": 0.95, "matrix_lr_ratio": 0.25}
    (here,) = runs_of(row(id="a", changes=both), row(id="b", changes=ratio)).situations()
    assert here.title == "tiny · adam_beta2 0.95, 4 steps"
    assert here.guards("clip") == ["clip", "clip · matrix_lr_ratio 0.25"]


def test_runs_are_narrowed_by_fields_and_changes() -> None:
    runs = runs_of(row(id="a"), row(id="b", seed=1, changes={"corpus": "english"}))
    assert [r.id for r in runs.where(seed=0).rows] == ["a"]
    assert [r.id for r in runs.where(corpus="english", seed=1).rows] == ["b"]
    assert not runs.where(corpus="english", seed=0)
    assert not runs.only("floor")


def test_a_question_about_two_situations_or_an_absent_guard_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one situation among 2"):
        runs_of(row(id="a"), row(id="b", recipe="other")).loss("clip")
    with pytest.raises(ConfigurationError, match=r"'paper' in tiny, 4 steps; .* clip, floor"):
        runs_of().loss("paper")


def test_tables() -> None:
    contest = runs_of().contest("clip").splitlines()
    assert "| `clip` | 0.001 (edge) | 4.010 [3] | – | 0.001 | 3 of 9 |" in contest[2]
    assert "| −0.100 (−0.100 … −0.100), 3 of 3 | 0.001 to 0.01 (10×) | 0 of 9 |" in contest[3]
    failures = runs_of().failures("clip").splitlines()
    assert len(failures) == 4  # nothing failed at the other rates
    assert failures[-2] == "| tiny, 4 steps | 0.1 | `clip` | 3 of 3 | 3 of 3 | 6.000 | – |"
    assert failures[-1] == "|  | 0.1 | `floor` | 0 of 3 | 0 of 3 | 4.410 | 4.410 |"
    assert runs_of().costs().splitlines()[2] == "| tiny, 4 steps | `clip` | 0.50 % | 0 | 9 |"


# --- pages


def test_a_page_and_its_pictures_are_written_beside_the_template(tmp_path: Path) -> None:
    kinds = ("gains", "learning-rates", "progress")
    asked = "".join(f'{{{{ picture("{k}", rows("name"), "clip", "all") }}}}\n' for k in kinds)
    files = write_page(page_of(tmp_path, asked))
    assert [file.name for file in files] == [*(f"{kind}-all.png" for kind in kinds), "page.md"]
    assert files[-1].read_text(encoding="utf-8").startswith("![gains: all](gains-all.png)\n")
    for file in files[:-1]:
        assert len(description(file)) == 64


def test_another_loss_changes_text_and_picture(tmp_path: Path) -> None:
    asked = '{{ rows("name").loss("clip") }} {{ picture("gains", rows("name"), "clip", "all") }}'
    before = render_page(page_of(tmp_path, asked))
    changed = [replace(r, final_eval_loss=3.0, created="later") for r in grid_of_rows()]
    after = render_page(page_of(tmp_path, asked, changed))
    assert (before.text[:5], after.text[:5]) == ("4.010", "3.000")
    assert before.pictures["gains-all.png"].digest != after.pictures["gains-all.png"].digest


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "shows no rows of name"),
        ("{{ rows('name').los }}", "has no attribute 'los'"),
        ("{% if %}", "has an error"),
        ("{{ rows('name').loss('paper') }}", "the guards there are clip, floor"),
    ],
)
def test_a_mistake_in_a_template_is_named(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        render_page(page_of(tmp_path, template))


def test_only_templates_are_rendered(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"page with \.j2"):
        write_page(tmp_path / "README.md")


# --- the stored rows


def test_summaries_are_merged_and_the_newest_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "name.jsonl"
    assert merge_summaries(path, [row(seed=0, created="2"), row(seed=1, created="2")]) == 2
    newer = row(seed=0, created="3", loss=3.0, interventions=(2, 4))
    rest = [row(seed=1, created="1", loss=9.0), row(seed=2, status="failed")]
    assert merge_summaries(path, [newer, *rest]) == 2
    found = {r.seed: r for r in Runs.of(read_rows(path)).rows}
    assert {seed: r.final_eval_loss for seed, r in found.items()} == {0: 3.0, 1: 4.0}
    assert found[0].times_acted == 2


def test_a_summary_of_a_long_run_is_short(tmp_path: Path) -> None:
    steps = range(1, 2401)
    long = row(
        num_steps=2400,
        losses=tuple(4.0 + 1 / step for step in steps),
        grad_norms=tuple(1 / step for step in steps),
        eval_steps=tuple(range(100, 2401, 100)),
        eval_losses=tuple(4.0 + 1 / (3 * step) for step in range(100, 2401, 100)),
        interventions=tuple(steps),
        extra={"health": {"step": list(steps)}, "fault_start": 300},
        versions=versions(),
        changes={"num_steps": 2400, "corpus": "english", "schedule": "cosine"},
        created="2026-11-30T20:00:00+00:00",
    )
    short = long.summary()
    assert len(short.to_line().encode()) < 2000
    assert (short.eval_losses, short.times_acted) == (long.eval_losses, 2400)
    assert short.extra == {"fault_start": 300}
    append_row(tmp_path / "rows.jsonl", short)
    assert list(read_rows(tmp_path / "rows.jsonl")) == [short]
