"""Metrics outside of the range of healthy twins, their leads and their false alarms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from watched_rows import DEPARTURE, EXPLOSION, STEPS, falling, family_of_rows, watched

from hf_pss.evidence.early_warnings import departure_step
from hf_pss.evidence.twin_band import (
    WIDENINGS,
    MetricScore,
    excess_of,
    families_of,
    metrics_of,
    render_scores,
    score_metrics,
)

TWINS = [watched(seed=seed) for seed in range(3)]
RANK = ("stable_rank/min",)


def shown(rows: list) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_scores(score_metrics(families_of(rows), max_false_alarms=1.0)))
    return captured.get()


def by_metric(rows: list) -> dict[str, MetricScore]:
    return {s.name: s for s in score_metrics(families_of(rows), max_false_alarms=1.0)}


# ---- who is whose twin ----


def test_twins_are_the_healthy_runs_of_the_lowest_rate() -> None:
    (family,) = families_of(family_of_rows())
    assert [row.seed for row in family.twins] == [0, 1, 2]
    assert {row.learning_rate for row in family.exploded} == {1e-2}
    assert [row.learning_rate for row in family.survivors] == [3e-3]


def test_the_twins_of_a_fault_are_undamaged() -> None:
    calm = [replace(row, recipe="undamaged") for row in TWINS]
    harmed = watched(recipe="nan_gradient", explosion_step=EXPLOSION, fault_start=200)
    unhurt = watched(recipe="random_batch", fault_start=200)
    found = families_of([*calm, harmed, unhurt])
    assert [family.recipe for family in found] == ["nan_gradient", "random_batch"]
    assert all(len(family.twins) == len(calm) for family in found)
    assert found[0].exploded == (harmed,)
    assert found[1].survivors == (unhurt,)


def test_the_twins_of_a_fault_ran_at_its_rate() -> None:
    calm = [
        watched(rate, seed, recipe="undamaged") for rate in (1e-4, 1e-3, 1e-2) for seed in range(3)
    ]
    harmed = [
        watched(rate, recipe="damaged", explosion_step=EXPLOSION, fault_start=200)
        for rate in (1e-3, 1e-2)
    ]
    found = [family for family in families_of([*calm, *harmed]) if family.exploded]
    assert [{row.learning_rate for row in family.twins} for family in found] == [{1e-3}, {1e-2}]
    assert [family.exploded for family in found] == [(row,) for row in harmed]
    assert [family.recipe for family in found] == [
        "damaged · adamw · watched · 0.001",
        "damaged · adamw · watched · 0.01",
    ]


@pytest.mark.parametrize(
    "other", [{"guard": "clip"}, {"optimizer": "muon"}, {"changes": {"num_steps": 300}}]
)
def test_what_a_comparison_holds_fixed_is_not_mixed(other: dict[str, Any]) -> None:
    """A guard that acts has other metrics, and no twin of the others."""
    rows = family_of_rows()
    others = [replace(row, id=f"other-{row.id}", **other) for row in rows]
    (alone,) = families_of(rows)
    found = families_of([*rows, *others])
    assert [len(family.twins) for family in found] == [3, 3]
    assert alone in [replace(family, recipe="tiny") for family in found]
    assert len({family.recipe for family in found}) == 2


def test_without_three_twins_nothing_is_judged() -> None:
    families = families_of(family_of_rows()[1:])
    assert len(families) == 1
    assert score_metrics(families, max_false_alarms=1.0) == []
    assert families_of([replace(row, extra={}) for row in family_of_rows()]) == ()
    assert score_metrics((), max_false_alarms=1.0) == []


def test_metrics_gather_their_series_and_pass_over_counts() -> None:
    found = metrics_of(watched(probes={"step": [1], "update_norm": [0.5]}))
    assert found == {
        "loss": ("loss",),
        "update_norm": ("update_norm",),
        "stable_rank": RANK,
        "spectral_edge": ("spectral_edge",),
    }


# ---- readings outside of the range ----


def test_the_distance_is_in_widths_of_the_range_on_a_logarithmic_scale() -> None:
    twins = [watched(rank=[value] * len(STEPS)) for value in (1.0, 10.0)]
    mine = watched(rank=[1000.0] * len(STEPS))
    assert excess_of(mine, twins, RANK) == pytest.approx(dict.fromkeys(STEPS, 2.0))
    below = watched(rank=[0.0] * len(STEPS))
    assert set(excess_of(below, twins, RANK).values()) == {math.inf}


def test_a_range_that_holds_zero_is_linear() -> None:
    twins = [watched(rank=[value] * len(STEPS)) for value in (-1.0, 1.0)]
    mine = watched(rank=[4.0] * len(STEPS))
    assert excess_of(mine, twins, RANK) == pytest.approx(dict.fromkeys(STEPS, 1.5))


def test_a_range_without_width_is_left_at_once() -> None:
    twins = [watched(rank=[0.0] * len(STEPS))] * 2
    assert set(excess_of(twins[0], twins, RANK).values()) == {0.0}
    mine = watched(rank=[1e-6] * len(STEPS))
    assert set(excess_of(mine, twins, RANK).values()) == {math.inf}


def test_a_missing_number_is_outside_where_a_twin_has_one_and_nowhere_else() -> None:
    mine = watched(rank=[None] * len(STEPS))
    assert set(excess_of(mine, TWINS, RANK).values()) == {math.inf}
    # So it is where not one matrix ever had a finite number, whose extremes nobody wrote then.
    health = {name: values for name, values in mine.extra["health"].items() if name not in RANK}
    assert excess_of(replace(mine, extra={"health": health}), TWINS, RANK) == dict.fromkeys(
        STEPS, math.inf
    )
    # The spectral edge has no first reading in any run.
    assert min(excess_of(mine, TWINS, ("spectral_edge",))) == STEPS[1]


# ---- scores ----


def test_a_metric_that_a_run_never_recorded_says_nothing_of_it() -> None:
    """Another preset or version may lack the metric; that is not a broken number."""
    rows = family_of_rows()
    health = {k: v for k, v in rows[3].extra["health"].items() if "stable_rank" not in k}
    rows[3] = replace(rows[3], extra={"health": health})
    rows[5] = replace(rows[5], extra={"health": health})
    rank = by_metric(rows)["stable_rank"]
    assert rank.leads == (DEPARTURE - 150,)
    assert (rank.num_unrecorded, rank.num_survivors) == (1, 0)
    assert "1 of 1 (1 not recorded)" in shown(rows)
    assert by_metric(rows)["spectral_edge"].num_unrecorded == 0


def test_leads_run_from_the_first_reading_outside_to_the_departure() -> None:
    rows = family_of_rows()
    found = by_metric(rows)
    departures = [departure_step(row.losses, EXPLOSION) for row in rows[3:5]]
    assert departures == [DEPARTURE] * 2
    rank = found["stable_rank"]
    assert rank.first_steps == (100, 150)
    assert rank.leads == (DEPARTURE - 100, DEPARTURE - 150)
    assert rank.num_ahead == 2
    assert rank.median_lead == DEPARTURE - 125
    assert (rank.num_survivors_outside, rank.num_survivors) == (1, 1)
    assert rank.num_healthy_readings == 3 * len(STEPS)
    assert found["spectral_edge"].leads == (None, None)
    assert found["spectral_edge"].median_lead is None


def test_the_loss_is_behind_itself() -> None:
    leads = by_metric(family_of_rows())["loss"].leads
    assert all(lead is not None and lead <= 0 for lead in leads)


def test_a_noisy_twin_widens_the_range_until_it_is_within_it() -> None:
    """At no widening the outer twins are outside of the others' range; then nobody is."""
    rows = family_of_rows()
    assert by_metric(rows)["stable_rank"].threshold > WIDENINGS[0]
    assert by_metric(rows)["stable_rank"].num_false_alarms == 0
    (loose,) = (
        s
        for s in score_metrics(families_of(rows), max_false_alarms=1000.0)
        if s.name == "stable_rank"
    )
    assert loose.threshold == WIDENINGS[0]
    assert loose.num_false_alarms > 0


def test_a_twin_far_from_the_others_silences_a_metric() -> None:
    flat = [replace(watched(seed=seed, rank=[0.0] * len(STEPS))) for seed in range(2)]
    rows = [*flat, watched(seed=2), *family_of_rows()[3:]]
    assert "stable_rank" not in by_metric(rows)


def test_survivors_may_count_as_healthy() -> None:
    """Ranks that halve in a survivor as in the explosions warn of nothing."""
    families = families_of(family_of_rows())
    strict = score_metrics(families, max_false_alarms=1.0, with_survivors=True)
    (rank,) = (score for score in strict if score.name == "stable_rank")
    assert rank.leads == (None, None)
    assert (rank.num_survivors_outside, rank.num_false_alarms) == (0, 0)
    assert rank.num_healthy_readings == 4 * len(STEPS)


def test_the_table_shows_the_earliest_first() -> None:
    rows = [*family_of_rows(), watched(1e-2, 2, rank=falling(100), explosion_step=EXPLOSION)]
    lines = shown(rows).splitlines()
    assert lines[2].split()[0] == "stable_rank"
    for cell in ("3 of 3", "101 (51…101)", "100…150", "1 of 1"):
        assert cell in lines[2]


def test_names_of_rows_from_elsewhere_are_plain_text() -> None:
    rows = [replace(row, recipe="[red]ramp[/red]\x1b[2J") for row in family_of_rows()]
    table = shown(rows)
    assert "[red]ramp[/red]\\x1b[2J" in table
    assert "\x1b" not in table
