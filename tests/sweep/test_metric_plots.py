"""The pictures of the live metrics: a panel each, explosions marked, gaps and NaN drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from watched_rows import DEPARTURE, EXPLOSION, STEPS, family_of_rows, watched

from hf_pss.evidence.sweep_plots import plot_family, plot_metrics
from hf_pss.evidence.twin_band import families_of, metrics_of

LARGEST_BYTES = 300_000


def test_a_family_is_one_small_file(tmp_path: Path) -> None:
    (file,) = plot_metrics(families_of(family_of_rows()), tmp_path)
    assert file.name == "metrics-tiny.png"
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < LARGEST_BYTES
    assert plt.get_fignums() == []


def test_every_metric_has_its_panel_and_the_explosion_is_marked() -> None:
    rows = family_of_rows()
    figure = plot_family(families_of(rows)[0])
    shown = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    assert set(metrics_of(rows[0])) <= set(shown)
    marks = {float(line.get_xdata()[0]) for line in shown["stable_rank"].lines[-2:]}
    assert marks == {DEPARTURE, EXPLOSION}


def test_a_fault_is_marked_where_nothing_exploded_and_gaps_are_drawn() -> None:
    calm = [watched(seed=seed, recipe="undamaged") for seed in range(3)]
    gone = watched(recipe="random_batch", rank=[None] * len(STEPS), fault_start=200)
    (family,) = families_of([*calm, gone])
    figure = plot_family(family)
    assert figure.axes[0].lines[-1].get_xdata()[0] == 200


def test_runs_of_different_lengths_and_rhythms_share_a_panel() -> None:
    """A guard that stops a run ends its series; the median continues with the others."""
    rows = family_of_rows()
    health = {name: values[:12] for name, values in rows[3].extra["health"].items()}
    rows[3] = replace(rows[3], losses=rows[3].losses[:EXPLOSION], extra={"health": health})
    health = {name: values[::2] for name, values in rows[1].extra["health"].items()}
    rows[1] = replace(rows[1], extra={"health": health})
    figure = plot_family(families_of(rows)[0])
    (panel,) = (axes for axes in figure.axes if axes.get_title() == "stable_rank")
    twins, _, exploded = panel.lines[:3]
    assert tuple(twins.get_xdata()) == tuple(exploded.get_xdata()) == STEPS
    assert np.isfinite(exploded.get_ydata()).all()
    # The second twin, of the middle seed, has read every other step: between, two are left.
    calm = [20 - 0.02 * step + 0.2 for step in STEPS]
    assert list(twins.get_ydata()) == pytest.approx(calm)


def test_a_recipes_name_does_not_leave_the_folder(tmp_path: Path) -> None:
    rows = [replace(row, recipe="/../../escaped") for row in family_of_rows()]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (file,) = plot_metrics(families_of(rows), folder)
    assert file == folder / "metrics--..-..-escaped.png"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_explosions_without_a_healthy_run_are_drawn() -> None:
    (family,) = families_of(family_of_rows()[3:5])
    assert "no healthy twin" in plot_family(family).get_suptitle()
