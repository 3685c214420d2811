"""Pictures of a sweep: drawn from the rows there are, without a warning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from sweep_rows import SETTING, grid_of_rows, row

from hf_pss.evidence.sweep_plots import plot_all, plot_learning_rates, plot_paired


def test_every_picture_is_a_png_and_an_svg(tmp_path: Path) -> None:
    files = plot_all(grid_of_rows(), tmp_path, reference="clip")
    names = {"curves", "learning-rates", "paired"}
    expected = {f"tiny-adamw-{name}{end}" for name in names for end in (".png", ".svg")}
    assert {file.name for file in files} == expected
    for file in files:
        start = file.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in start


def test_one_rate_and_one_guard_give_curves_alone(tmp_path: Path) -> None:
    files = plot_all([row(), row(seed=1)], tmp_path, reference="clip")
    assert {file.stem for file in files} == {"tiny-adamw-curves"}


def test_runs_that_broke_off_and_lost_all_are_drawn(tmp_path: Path) -> None:
    broken = [
        replace(one, losses=(5.0, None, None, None) if one.seed else (None, None))
        for one in grid_of_rows()
    ]
    assert plot_all(broken, tmp_path, reference="clip")


def test_the_learning_rate_picture_holds_medians_and_names() -> None:
    axes = plot_learning_rates(grid_of_rows(), SETTING, "clip").axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    drawn = sorted(tuple(float(y) for y in line.get_ydata()) for line in lines)
    assert drawn[0] == pytest.approx((3.93, 3.91, 4.41))
    assert drawn[1] == pytest.approx((4.01, 4.51, 6.0))
    assert {"clip", "floor"} <= {text.get_text() for text in axes.texts}
    assert axes.get_xscale() == "log"


def test_the_paired_picture_tells_rates_and_seeds() -> None:
    axes = plot_paired(grid_of_rows(), SETTING, "clip").axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["floor, 0.01  [3]"]
    assert "clip at 0.001" in axes.get_xlabel()


def test_no_figure_stays_open(tmp_path: Path) -> None:
    plot_all(grid_of_rows(), tmp_path, reference="clip")
    assert plt.get_fignums() == []
