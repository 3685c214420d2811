"""Warnings, leads and false alarms on curves made by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.early_warnings import (
    MARGIN_NATS,
    RULES,
    LeadScore,
    at_equal_rate,
    departure_step,
    lead_time,
    record_of,
    render_table,
    score,
    warning_steps,
)
from hf_pss.evidence.probes import PROBED
from hf_pss.evidence.rows import Row


def row(
    losses: Sequence[float | None],
    probes: dict[str, Any] | None = None,
    *,
    explosion_step: int | None = None,
    recipe: str = "r",
    status: str = "finished",
) -> Row:
    return Row(
        id="x",
        recipe=recipe,
        optimizer="adamw",
        learning_rate=1e-3,
        guard="none",
        seed=0,
        num_steps=len(losses),
        status=status,
        unigram_entropy=6.4,
        losses=tuple(losses),
        explosion_step=explosion_step,
        extra={} if probes is None else {"probes": probes},
    )


def probes_of(**series: list[float | None]) -> dict[str, Any]:
    return {"step": list(range(1, 1 + len(next(iter(series.values()))))), **series}


def explosive() -> list[float | None]:
    """Descend for 100 steps, stay for 100, rise from step 201 on."""
    return [5 - 0.02 * min(t, 100) + 0.05 * max(0, t - 200) for t in range(1, 251)]


def chosen(rows: list[Row], name: str, *, max_false_alarms: float = 1) -> list[LeadScore]:
    return [s for s in at_equal_rate(rows, max_false_alarms=max_false_alarms) if s.name == name]


# ---- when the loss departs ----


def test_the_departure_is_the_last_time_the_loss_is_near_its_minimum() -> None:
    losses = explosive()
    # 0.05 nats a step: within the margin up to step 202.
    assert departure_step(losses, 240) == 200 + round(MARGIN_NATS / 0.05) + 1


def test_a_spike_that_comes_back_is_no_departure() -> None:
    losses = explosive()
    for t in range(120, 150):
        losses[t] = 9.0
    assert departure_step(losses, 240) == departure_step(explosive(), 240)


def test_noise_of_a_batch_is_no_departure_and_no_return() -> None:
    losses = explosive()
    losses[180], losses[230] = 9.0, 0.5
    assert departure_step(losses, 250) == departure_step(explosive(), 250)


def test_nan_departs_where_it_is_met() -> None:
    flat: list[float | None] = [3.0] * 40
    assert departure_step([*flat, None], 41) == 41
    assert departure_step([*flat, math.nan, math.inf], 41) == 41
    assert departure_step([None, None, None], 3) == 1


def test_a_plateau_departs_when_it_is_called_an_explosion() -> None:
    assert departure_step([6.43] * 100, 80) == 80


@pytest.mark.parametrize("step", [0, 11])
def test_the_explosion_must_be_among_the_losses(step: int) -> None:
    with pytest.raises(ConfigurationError, match="explosion step"):
        departure_step([1.0] * 10, step)


def test_what_comes_after_the_explosion_does_not_count() -> None:
    losses = explosive()
    assert departure_step([*losses, *[0.1] * 50], 240) == departure_step(losses, 240)


# ---- leads ----


def test_the_first_warning_within_the_horizon_counts() -> None:
    losses, departure = explosive(), departure_step(explosive(), 240)
    assert lead_time(losses, [5, 150, 200], 240, horizon_steps=100) == departure - 150
    assert lead_time(losses, [5, 150, 200], 240, horizon_steps=300) == departure - 5
    assert lead_time(losses, [220], 240) == departure - 220
    assert lead_time(losses, [241], 240) is None
    assert lead_time(losses, [], 240) is None


# ---- warnings ----


def test_every_rule_reads_a_series_that_is_recorded_and_has_an_ordered_grid() -> None:
    for name, rule in RULES.items():
        assert rule.series in {*PROBED, "loss"}, name
        upwards = list(rule.thresholds) == sorted(rule.thresholds)
        assert upwards or list(rule.thresholds) == sorted(rule.thresholds, reverse=True)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_silent_on_a_flat_series_and_warns_of_its_own_trouble(name: str) -> None:
    rule = RULES[name]
    calm, trouble = 0.7, 0.005
    if rule.thresholds[0] > 1 and name.endswith("floor"):
        calm, trouble = 30.0, 1.0
    if name.endswith("ratio"):
        calm, trouble = 0.01, 0.9
    if rule.complement:
        calm, trouble = 0.02, 0.995
    values = [calm] * 40 + [trouble]
    record = dict(zip(range(10, 420, 10), values, strict=True))
    middle = rule.thresholds[len(rule.thresholds) // 2]
    assert warning_steps(rule, record, middle) == [410]


def test_nothing_warns_during_calibration_but_nan_always_does() -> None:
    rule = RULES["grad_norm_ratio"]
    record = dict(enumerate((*[1.0] * 10, 50.0, None, *[1.0] * 18), start=1))
    assert warning_steps(rule, record, 2.5) == [12]


def test_the_published_level_of_the_jacobian_energy_is_four_fifths() -> None:
    rule = RULES["jacobian_energy_level"]
    record = {1: 0.79, 2: 0.81, 3: 1.0000001}
    assert warning_steps(rule, record, 0.2) == [2, 3]


# ---- scores ----


def test_a_score_counts_explosions_leads_and_false_alarms() -> None:
    losses = explosive()
    norm: list[float | None] = [1.0] * 250
    norm[189] = 9.0
    early = row(losses, probes_of(grad_norm_preclip=norm), explosion_step=240)
    late_norm: list[float | None] = [1.0] * 250
    late_norm[219] = 9.0
    late = row(losses, probes_of(grad_norm_preclip=late_norm), explosion_step=240)
    silent = row(losses, probes_of(grad_norm_preclip=[1.0] * 250), explosion_step=240)
    noisy = [1.0] * 500
    noisy[100] = noisy[300] = 5.0
    healthy = row([3.0] * 500, probes_of(grad_norm_preclip=[*noisy]))
    stopped = row([3.0] * 500, probes_of(grad_norm_preclip=[*noisy]), status="stopped")
    unrecorded = row(losses, explosion_step=240)
    other = row([3.0] * 500, probes_of(grad_norm_preclip=[*noisy]), recipe="other")
    rows = [early, late, silent, healthy, stopped, unrecorded, other]
    found = score("grad_norm_ratio", rows, 2.5, recipe="r")
    departure = departure_step(losses, 240)
    assert found.leads == (departure - 190, departure - 220, None)
    assert found.num_ahead == 1
    assert found.false_alarm_rate == pytest.approx(4.0)
    assert found.median_lead == pytest.approx(departure - 205)


def test_a_rule_that_warns_always_pays_for_every_reading() -> None:
    low = [1.0] * 250
    rows = [
        row(explosive(), probes_of(min_stable_rank=[*low]), explosion_step=240),
        row([3.0] * 250, probes_of(min_stable_rank=[*low])),
    ]
    found = score("min_stable_rank_floor", rows, 2.0, recipe="r")
    assert found.num_ahead == len(found.leads) == 1
    assert found.false_alarm_rate == 1000
    assert chosen(rows, "min_stable_rank_floor", max_false_alarms=5) == []


def test_rules_are_compared_at_an_equal_rate() -> None:
    """Two rules warn at their own thresholds; at one rate only the informative one does."""
    chance = random.Random(0)
    quiet = [10 + chance.uniform(-1, 1) for _ in range(600)]
    informative = quiet[:190] + [4.0] * 60
    rows = [
        row(explosive(), probes_of(mean_stable_rank=[*informative]), explosion_step=240),
        row([3.0] * 600, probes_of(mean_stable_rank=[*quiet])),
    ]
    name = "mean_stable_rank_floor"
    sweep = [score(name, rows, level, recipe="r") for level in RULES[name].thresholds]
    rates = [s.false_alarm_rate for s in sweep if s.false_alarm_rate is not None]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1000
    (found,) = chosen(rows, name, max_false_alarms=2)
    assert found.threshold == 8.0
    assert found.false_alarm_rate == 0
    assert found.leads == (departure_step(explosive(), 240) - 191,)


def test_recipes_are_kept_apart_and_empty_ones_left_out() -> None:
    norm = probes_of(grad_norm_preclip=[1.0] * 30)
    rows = [row([3.0] * 30, norm, recipe="b"), row([3.0] * 30, recipe="a")]
    assert [s.recipe for s in chosen(rows, "grad_norm_ratio")] == ["b"]
    assert [s.recipe for s in chosen(rows, "loss_ratio")] == ["a", "b"]


def test_a_series_without_a_number_is_not_recorded() -> None:
    empty = row([3.0] * 3, probes_of(grad_norm_preclip=[None] * 3))
    assert record_of(empty, "grad_norm_preclip") == {}
    assert record_of(empty, "update_norm") == {}
    assert record_of(empty, "loss") == {1: 3.0, 2: 3.0, 3: 3.0}


def test_damage_is_named() -> None:
    damaged = row([3.0] * 3, {"step": [1, 2], "update_norm": [1.0]})
    with pytest.raises(ConfigurationError, match="1 values of 'update_norm' for 2 steps"):
        record_of(damaged, "update_norm")


def test_the_tables_show_what_was_counted() -> None:
    scores = (
        LeadScore(
            name="grad_norm_ratio",
            recipe="deep[24]",
            threshold=2.5,
            leads=(12, -3, None),
            num_false_alarms=1,
            num_healthy_readings=2000,
        ),
        LeadScore(
            name="loss_ratio",
            recipe="flat",
            threshold=1.2,
            leads=(),
            num_false_alarms=0,
            num_healthy_readings=0,
        ),
    )
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render_table(scores))
    assert "deep[24]" in captured.get()
    for cell in ("1 of 3", "4.5 (-3…12)", "0.5", "2000"):
        assert cell in captured.get()
