"""The tables: every figure in its place, the number of seeds beside it, both renderings alike."""

from __future__ import annotations

from rich.console import Console
from sweep_rows import grid_of_rows, row

from hf_pss.evidence.sweep_table import edge_warnings, render_markdown, render_tables


def lines_of(markdown: str, title: str) -> dict[str, list[str]]:
    """Return the cells of one table, by the first cell of each line."""
    body = markdown.split(title, 1)[1].split("**\n", 1)[1].split("**", 1)[0]
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in body.splitlines() if line]
    return {cells[0]: cells[1:] for cells in rows}


def test_losses_by_rate_mark_the_best_and_count_seeds() -> None:
    lines = lines_of(render_markdown(grid_of_rows(), reference="clip"), "median final validation")
    assert lines["guard"] == ["0.001", "0.01", "0.1", "range"]
    assert lines["clip"] == ["*4.010 [3]", "4.510 [3]", "6.000 [3]", "1×"]
    assert lines["floor"] == ["3.930 [3]", "*3.910 [3]", "4.410 [3]", "10×"]


def test_paired_differences_are_at_equal_rates_and_at_the_best_of_each() -> None:
    markdown = render_markdown(grid_of_rows(), reference="clip")
    paired = [line for line in markdown.splitlines() if line.startswith("| floor |")]
    assert "| floor | 0.001 | -0.080 | -0.080 … -0.080 | 3 | 3 |" in paired
    assert "| floor | own best: 0.01, 0.001 | -0.100 | -0.100 … -0.100 | 3 | 3 |" in paired


def test_explosions_are_counted_and_named() -> None:
    lines = lines_of(render_markdown(grid_of_rows(), reference="clip"), "runs that exploded")
    assert lines["clip"] == ["0 of 3", "0 of 3", "3 of 3 (rise)"]
    assert lines["floor"] == ["0 of 3", "0 of 3", "0 of 3"]


def test_cost_is_a_share_of_the_training_time() -> None:
    lines = lines_of(render_markdown(grid_of_rows(), reference="clip"), "cost by")
    assert lines["clip"] == ["0.50 %", "500.0 ms", "0", "9"]


def test_steps_to_a_target_are_told_only_if_asked_for() -> None:
    rows = grid_of_rows()
    assert "steps to a validation loss" not in render_markdown(rows, reference="clip")
    lines = lines_of(render_markdown(rows, reference="clip", target=3.95), "steps to a validation")
    assert lines["clip"] == ["0.001", "–", "0 of 3"]
    assert lines["floor"] == ["0.01", "4", "3 of 3"]


def test_without_the_reference_there_is_no_paired_table() -> None:
    markdown = render_markdown([row(), row(seed=1)], reference="floor")
    assert "paired difference" not in markdown
    assert "–" not in lines_of(markdown, "median final validation")["clip"]


def test_what_was_not_run_is_a_dash() -> None:
    rows = [row("clip", rate=1e-3), row("floor", rate=1e-2)]
    lines = lines_of(render_markdown(rows, reference="clip"), "median final validation")
    assert lines["clip"][1] == lines["floor"][0] == "–"


def test_each_recipe_and_optimizer_has_its_own_tables() -> None:
    markdown = render_markdown([row(), row(optimizer="muon")], reference="clip")
    assert markdown.count("runs that exploded") == 2


def test_the_terminal_shows_the_same_cells() -> None:
    rows = grid_of_rows()
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_tables(rows, reference="clip", target=3.95))
    shown = capture.get()
    markdown = render_markdown(rows, reference="clip", target=3.95)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = {c.strip() for line in table for c in line.strip("| ").split("|")}
    for cell in cells - {"---", "---:"}:
        assert cell in shown


def test_a_best_rate_at_the_edge_of_its_grid_is_named() -> None:
    (warning,) = edge_warnings(grid_of_rows())
    assert "tiny · adamw: the best rate of clip, 0.001, is at the edge" in warning
    assert edge_warnings([row(), row(seed=1)]) == []  # one rate is no grid
