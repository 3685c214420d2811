"""`hf-pss sweep`: what it prints and how it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commandline import Run

from hf_pss.evidence.guards import GUARDS
from hf_pss.evidence.rows import Row, append_row

USER_MISTAKE = 2
GRID = """
recipes: [slow_damage_tiny]
learning_rates: [1e-3]
guards: [clip]
changes: {num_layers: 1, width: 16, num_heads: 2, num_steps: 4, num_eval_blocks: 4,
          vocab_size: 300, context_length: 32, batch_size: 4}
"""


def row(guard: str, seed: int, loss: float, **more: object) -> Row:
    return Row(
        id=f"{guard}-{seed}",
        recipe="tiny",
        optimizer="adamw",
        learning_rate=1e-3,
        guard=guard,
        seed=seed,
        num_steps=4,
        final_eval_loss=loss,
        unigram_entropy=6.0,
        losses=(5.0, 4.0),
        eval_steps=(4,),
        eval_losses=(loss,),
        train_seconds=1.0,
        **{"status": "finished", **more},  # type: ignore[arg-type]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "sweep"
    made.mkdir()
    for seed in range(3):
        append_row(made / "rows.jsonl", row("clip", seed, 4.0))
        append_row(made / "rows.jsonl", row("floor", seed, 3.75))
    return made


def test_run_then_table(run: Run, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID, encoding="utf-8")
    words = ("sweep", "run", grid, "--output-dir", tmp_path / "out", "--processes", 1)
    assert run(*words).exit_code == 0
    again = run(*words)
    assert again.exit_code == 0
    assert "1 runs are already finished" in again.stderr
    shown = run("sweep", "table", "--output-dir", tmp_path / "out")
    assert shown.exit_code == 0
    assert "slow_damage_tiny" in shown.stdout
    rows = tmp_path / "rows" / "grid.jsonl"
    assert run("sweep", "export", rows, "--output-dir", tmp_path / "out").exit_code == 0
    stored = [Row.from_line(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [(row.eval_steps, row.losses) for row in stored] == [((4,), ())]


def test_table_as_markdown(run: Run, folder: Path) -> None:
    words = ("sweep", "table", "--output-dir", folder, "--markdown", "--target", "3.8")
    result = run(*words)
    assert result.exit_code == 0
    assert "| floor | 0.001 | -0.250 | -0.250 … -0.250 | 3 | 3 |" in result.stdout
    assert "steps to a validation loss of 3.8" in result.stdout
    assert "edge" not in result.stderr


def test_table_warns_of_a_best_rate_at_the_edge(run: Run, folder: Path) -> None:
    append_row(folder / "rows.jsonl", replace(row("clip", 9, 4.5), learning_rate=2e-3))
    result = run("sweep", "table", "--output-dir", folder, "--markdown")
    assert "the best rate of clip, 0.001, is at the edge of its grid" in result.stderr
    assert "edge" not in result.stdout


def test_rows_are_exported_and_rendered_as_a_page(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("sweep", "export", tmp_path / "rows" / "tiny.jsonl", "--output-dir", folder)
    assert "tiny.jsonl holds 6 rows" in " ".join(run(*words).stdout.split())
    template = tmp_path / "page.md.j2"
    template.write_text("{{ rows('tiny').gain('floor', 'clip') }}\n", encoding="utf-8")
    result = run("sweep", "page", template)
    assert result.exit_code == 0
    assert "page.md" in result.stdout
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (
        "−0.250 (−0.250 … −0.250), 3 of 3\n"
    )
    assert run("sweep", "page", tmp_path / "page.md").exit_code == USER_MISTAKE


def test_table_for_the_terminal(run: Run, folder: Path) -> None:
    result = run("sweep", "table", "--output-dir", folder)
    assert result.exit_code == 0
    assert "floor" in result.stdout
    assert "|" not in result.stdout


def test_the_newer_row_of_a_run_counts(run: Run, folder: Path) -> None:
    append_row(folder / "rows.jsonl", row("floor", 0, 3.75))
    result = run("sweep", "table", "--output-dir", folder, "--markdown")
    assert "3.750 [3]" in result.stdout


def test_plot_names_its_files(run: Run, folder: Path) -> None:
    result = run("sweep", "plot", "--output-dir", folder)
    assert result.exit_code == 0
    files = [Path(line) for line in result.stdout.splitlines()]
    assert files
    assert all(file.is_file() for file in files)


def test_guards_are_listed_with_their_sources(run: Run) -> None:
    result = run("sweep", "guards")
    assert result.exit_code == 0
    assert all(name[:8] in result.stdout for name in GUARDS)
    assert "z_thresh" in result.stdout


def test_metrics_are_judged_and_drawn(run: Run, folder: Path) -> None:
    def watched(seed: int, rank: float, **more: object) -> Row:
        health = {"step": [1, 2], "stable_rank/min": [5.0 + 0.1 * seed, rank]}
        return row("watched", seed, 4.0, extra={"health": health}, **more)

    for seed in range(3):
        append_row(folder / "rows.jsonl", watched(seed, 5.0))
    exploded = watched(3, 1.0, explosion_step=2, explosion_kind="non_finite")
    append_row(folder / "rows.jsonl", exploded)
    result = run("sweep", "metrics", "--output-dir", folder)
    assert result.exit_code == 0
    assert "stable_rank" in result.stdout
    assert (folder / "metrics-tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "absent.yaml"), "cannot be read"),
        (("table", "--output-dir", "absent"), "cannot be read"),
        (("table", "--output-dir", "sweep", "--reference", "magic"), "clip or floor"),
        (("plot", "--output-dir", "sweep", "--reference", "magic"), "clip or floor"),
        (("warnings", "--output-dir", "sweep"), "probes_every_steps"),
        (("metrics", "--output-dir", "sweep"), "kept health metrics"),
        (("run", "absent.yaml", "--processes", "0"), "processes"),
    ],
)
def test_mistakes_end_with_code_two_and_a_message(
    run: Run, folder: Path, words: tuple[str, ...], told: str
) -> None:
    result = run("sweep", *words)
    assert result.exit_code == USER_MISTAKE
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_unknown_guard_in_a_grid_is_a_mistake(run: Run, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID.replace("[clip]", "[prayer]"), encoding="utf-8")
    result = run("sweep", "run", grid)
    assert result.exit_code == USER_MISTAKE
    assert "'prayer'" in result.stderr
