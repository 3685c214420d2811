from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from hf_pss.evidence.report_page import (
    colour_of,
    gradient_figure,
    headline_plot,
    loss_figure,
    moving_average,
    noise_levels,
    stable_rank_figure,
)
from hf_pss.evidence.report_records import load_run_directory
from hf_pss.view.canvas import new_figure, style, to_png, to_svg, use_log_scale
from hf_pss.view.heat_map import MatrixRow, row_of


@pytest.mark.parametrize("window", [1, 2, 5, 99])
def test_a_moving_average_keeps_a_constant(window: int) -> None:
    assert moving_average(np.full(20, 3.0), window) == pytest.approx(np.full(20, 3.0))


def test_a_moving_average_skips_what_is_not_finite() -> None:
    values = np.array([1.0, np.nan, np.inf, np.nan, np.nan, 5.0])
    assert moving_average(values, 3) == pytest.approx([1, 1, np.nan, np.nan, 5, 5], nan_ok=True)
    assert moving_average(np.array([]), 3).size == 0


def test_a_moving_average_matches_its_definition() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(50)]
    assert moving_average(values, 7) == pytest.approx(expected)


@pytest.mark.parametrize("height", [20.0, 1e6, 3e38])
def test_an_exploding_loss_does_not_flatten_the_rest(height: float, files: Any) -> None:
    losses: list[float | None] = [7.0 - 0.05 * i for i in range(40)]
    losses[20:23] = [height, None, height]
    files.run("plain", losses=losses)
    figure = loss_figure(load_run_directory(files.info()))
    assert figure.axes[1].get_ylim()[1] == pytest.approx(1.15 * 7.0)
    assert figure.axes[1].get_ylim()[0] > 4.5
    assert any("cut off" in text.get_text() for text in figure.axes[1].texts)
    crosses = figure.axes[1].get_lines()[-1]
    assert crosses.get_marker() == "x"
    assert list(crosses.get_xdata()) == [21]


def test_a_calm_loss_is_not_cut(twins: Path) -> None:
    figure = loss_figure(load_run_directory(twins))
    assert not any("cut off" in text.get_text() for axes in figure.axes for text in axes.texts)


def test_an_exploding_gradient_is_cut_and_says_so(files: Any) -> None:
    files.run("plain", norms=[1.0] * 39 + [1e30])
    axes = gradient_figure(load_run_directory(files.info())).axes[0]
    assert axes.get_ylim()[1] <= 4e4
    assert any("the largest is 1e+30" in text.get_text() for text in axes.texts)


def test_every_intervention_is_marked(twins: Path) -> None:
    figure = gradient_figure(load_run_directory(twins))
    marked = [list(axes.get_lines()[3].get_xdata()) for axes in figure.axes]
    assert marked == [[], [12], [10, 20]]


@pytest.mark.parametrize("norms", [[None] * 5, [0.0] * 5, [1e-30] * 5, [0.0, None, 1.0, 2.0, 3.0]])
def test_odd_gradients_can_be_drawn(norms: list[float | None], files: Any) -> None:
    files.run("plain", losses=[None] * 5, norms=norms, evals=())
    directory = load_run_directory(files.info())
    with style():
        for figure in (loss_figure(directory), gradient_figure(directory)):
            assert to_svg(figure).startswith(b"<?xml")


def test_the_colours_of_guards_differ(files: Any) -> None:
    for guard in ("a", "b", "plain", "c"):
        files.run(guard)
    directory = load_run_directory(files.info())
    assert len({colour_of(directory, guard) for guard in directory.guards}) == 4


def test_the_callers_style_comes_back_and_pyplot_is_never_loaded(twins: Path) -> None:
    before = dict(mpl.rcParams)
    headline_plot(twins, twins / "figures" / "headline.png")
    assert (twins / "figures" / "headline.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before
    script = "import sys, hf_pss.evidence.report_page; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_headline_plot_draws_seeds_that_stopped_at_different_steps(files: Any) -> None:
    files.run("plain", evals=(6.0, 5.0))
    files.run("plain", seed=1, evals=(6.2,), finished=False)
    files.run("floor", evals=(), finished=False)
    root = files.info()
    headline_plot(root, root / "headline.png")
    assert (root / "headline.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("transformer.h.3.attn.c_attn.weight[q]", MatrixRow(3, "attn.c_attn[q]")),
        ("model.layers.11.self_attn.q_proj.weight", MatrixRow(11, "self_attn.q_proj")),
        ("model.layers.2.mlp.experts.7.up_proj.weight", MatrixRow(2, "mlp.experts.*.up_proj")),
        ("bert.encoder.layer.0.output.dense.weight", MatrixRow(0, "output.dense")),
        ("pooler.dense.weight", MatrixRow(-1, "pooler.dense")),
        ("", MatrixRow(-1, "")),
    ],
)
def test_block_and_role_are_found_in_names(name: str, row: MatrixRow) -> None:
    assert row_of(name) == row


def test_noise_levels_follow_the_shapes(
    files: Any, make_intervention: Any, make_change: Any
) -> None:
    shapes = [[64, 64], [256, 64], [64, 256], [768, 768], [], [3, 0]]
    changes = [make_change(shape=shape) for shape in shapes]
    files.run("floor", events=[make_intervention(1, matrices=changes)])
    levels = noise_levels(load_run_directory(files.info()))
    assert levels == {
        "64×64": pytest.approx(16),
        "64×256": pytest.approx(28.4, abs=0.05),
        "768×768": pytest.approx(192),
    }


def test_the_map_has_one_scale_for_all_guards(twins: Path) -> None:
    figure = stable_rank_figure(load_run_directory(twins))
    assert figure is not None
    limits = {axes.collections[0].get_clim() for axes in figure.axes[:3]}
    assert limits == {(2.0, 10.0)}


def test_the_map_survives_gaps(files: Any) -> None:
    folder = files.run("plain")
    (folder / "pss_health.jsonl").write_text(
        '{"step": 5, "stable_rank": {"h.0.a": 3.0, "h.0.b": null, "norm": 1.0}}\n'
        '{"step": 50, "stable_rank": {"h.0.a": null, "h.1.a": 0.0}}\n',
        encoding="utf-8",
    )
    figure = stable_rank_figure(load_run_directory(files.info()))
    assert figure is not None
    values = figure.axes[0].collections[0].get_array().reshape(4, 2)
    assert np.ma.filled(values, -1).tolist() == [[1, -1], [3, -1], [-1, -1], [-1, 0]]
    with style():
        to_png(figure)


def test_the_map_shows_the_expert_that_breaks(files: Any) -> None:
    folder = files.run("plain")
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(3)]
    rows = ([9.0, 2.0, 9.0], [9.0, None, 9.0])
    lines = [
        json.dumps({"step": step, "stable_rank": dict(zip(names, ranks, strict=True))})
        for step, ranks in enumerate(rows)
    ]
    (folder / "pss_health.jsonl").write_text("\n".join(lines), encoding="utf-8")
    figure = stable_rank_figure(load_run_directory(files.info()))
    assert figure is not None
    assert np.ma.filled(figure.axes[0].collections[0].get_array(), -1).tolist() == [[2, -1]]


def test_the_map_of_nothing_finite_is_a_map(files: Any) -> None:
    folder = files.run("plain")
    (folder / "pss_health.jsonl").write_text('{"step": 5, "stable_rank": {"h.0.a": null}}')
    figure = stable_rank_figure(load_run_directory(files.info()))
    assert figure is not None
    with style():
        to_png(figure)


@pytest.mark.parametrize("text", ["", '{"step": 1, "stable_rank": {}}', '{"step": 1}'])
def test_no_stable_rank_gives_no_map(text: str, files: Any) -> None:
    (files.run("plain") / "pss_health.jsonl").write_text(text, encoding="utf-8")
    assert stable_rank_figure(load_run_directory(files.info())) is None


def test_the_same_figure_is_the_same_file() -> None:
    def draw() -> bytes:
        with style():
            figure = new_figure(3, 2)
            figure.subplots().plot([1, 2])
            return to_svg(figure)

    assert draw() == draw()


@pytest.mark.parametrize("values", [(0.3, 40.0), (2.0, 4.0), (0.3, 0.9)])
def test_logarithmic_axes_show_numbers_and_no_mathematics(values: tuple[float, float]) -> None:
    with style():
        figure = new_figure(4.0, 3.0)
        axes = figure.subplots()
        axes.plot(values)
        use_log_scale(axes)
        to_svg(figure)  # which sets the labels
        labels = [label.get_text() for label in axes.get_yticklabels(which="both")]
    shown = [label for label in labels if label]
    assert shown
    assert all(float(label) > 0 and "e" not in label for label in shown)
