from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest

from hf_pss.records.events import HealthReading
from hf_pss.trainer.health_summary import summary_table
from hf_pss.trainer.tracker_content import (
    MAX_CURVES,
    MAX_NUMBERS,
    NUM_BINS,
    NUM_PLACES,
    Curves,
    ThinnedReadings,
    histogram_of,
    label_of,
    scalars_of,
)

BROKEN = (math.nan, math.inf, -math.inf)


# ---- histograms ----


@pytest.mark.parametrize(
    "top",
    [1e-320, sys.float_info.min, 1e-30, 1.0, 1e30, sys.float_info.max],
    ids=["subnormal", "smallest", "small", "one", "large", "largest"],
)
def test_a_spectrum_of_any_size_is_counted(top: float) -> None:
    found = histogram_of((top, top / 2, 0.0, *BROKEN))
    assert found is not None
    assert found.counts.sum() == 3
    assert len(found.edges) == NUM_BINS + 1
    assert (found.edges[1:] > found.edges[:-1]).all()


@pytest.mark.parametrize("values", [(), BROKEN])
def test_nothing_finite_has_no_histogram(values: tuple[float, ...]) -> None:
    assert histogram_of(values) is None


def test_zeros_have_a_histogram() -> None:
    found = histogram_of((0.0, 0.0))
    assert found is not None
    assert found.counts[0] == 2


# ---- names ----


def test_labels_are_tags_of_every_tracker() -> None:
    assert label_of("h.3.mlp.experts.gate_up_proj[2]") == "h.3.mlp.experts.gate_up_proj.2"
    assert label_of("a/b c\x1b.weight") == "a_b_c_"


def test_scalars_keep_nan() -> None:
    reading = HealthReading(
        step=1,
        scalars={"stable_rank/min": math.nan, "pss/seconds": 1.0},
        matrices={"stable_rank": {"a.weight": math.inf}},
        spectra={"a.weight": (1.0, math.nan), "b": (1.0,)},
    )
    found = dict(scalars_of(reading))
    assert math.isnan(found.pop("pss/stable_rank/min"))
    assert found == {
        "pss/seconds": 1.0,
        "pss_health/stable_rank/a": math.inf,
        "pss/nonfinite_spectra": 1.0,
    }


# ---- thinned readings ----


def reading(step: int, num_matrices: int = 2) -> HealthReading:
    return HealthReading(
        step=step, matrices={"stable_rank": {f"m{i}": float(step) for i in range(num_matrices)}}
    )


def test_readings_are_thinned_evenly_and_keep_their_ends() -> None:
    readings = ThinnedReadings(max_readings=8)
    for step in range(101):
        readings.add(reading(step))
        steps = [kept.step for kept in readings.kept]
        assert steps[0] == 0
        assert steps[-1] == step
        assert len(steps) <= 9
        assert len({b - a for a, b in pairwise(steps[:-1])}) <= 1


def test_readings_of_many_matrices_are_bounded() -> None:
    readings = ThinnedReadings()
    num_matrices = MAX_NUMBERS // 10
    for step in range(40):
        readings.add(reading(step, num_matrices))
        assert len(readings.kept) <= 11


def test_rows_fill_the_room_of_a_table() -> None:
    readings = ThinnedReadings()
    for step in range(10):
        readings.add(reading(step))
    assert len(readings.rows(max_rows=100)) == 20
    rows = readings.rows(max_rows=7)
    assert [row[0] for row in rows] == [1, 1, 5, 5, 9, 9]
    readings.add(HealthReading(step=10, matrices={"stable_rank": {"a": 2.0, "b": 9.0, "c": 1.0}}))
    assert readings.rows(max_rows=2) == ((10, "c", 1.0), (10, "a", 2.0))


# ---- more matrices than a dashboard holds ----


def wide(step: int, num_matrices: int, **ranks: float) -> HealthReading:
    names = [f"h.0.experts.{i}" for i in range(num_matrices)]
    return HealthReading(
        step=step,
        scalars={"stable_rank/min": 1.0},
        matrices={
            "stable_rank": {name: 10.0 + i for i, name in enumerate(names)} | ranks,
            "token_cosine": {"h.0": 0.5},
        },
        spectra={name: (2.0, math.nan) for name in names},
    )


def test_of_very_many_matrices_the_worst_have_curves(caplog: pytest.LogCaptureFixture) -> None:
    few = wide(1, MAX_CURVES)
    assert Curves().of(few) is few
    curves = Curves()
    found = curves.of(wide(1, 5_000))
    first = tuple(f"h.0.experts.{i}" for i in range(NUM_PLACES // 2))
    assert tuple(found.matrices["stable_rank"]) == tuple(found.spectra) == first
    assert found.matrices["token_cosine"] == {"h.0": 0.5}
    told = dict(scalars_of(found))
    assert (told["pss/stable_rank/min"], told["pss/nonfinite_spectra"]) == (1.0, 5_000.0)
    later = curves.of(wide(2, 5_000, **{"h.0.experts.4321": math.nan}))
    assert math.isnan(later.matrices["stable_rank"]["h.0.experts.4321"])
    assert set(first) < set(later.matrices["stable_rank"])
    for step in range(3, 30):  # each step breaks others
        broken = {f"h.0.experts.{step * 100 + i}": math.nan for i in range(50)}
        later = curves.of(wide(step, 5_000, **broken))
    assert len(later.matrices["stable_rank"]) == NUM_PLACES
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("This model has 5000 matrices. Trackers get curves of the 128 worst")


def test_a_metric_that_a_step_has_not_measured_is_none() -> None:
    readings = ThinnedReadings()
    readings.add(HealthReading(step=1, matrices={"a": {"m": 1.0}}))
    readings.add(HealthReading(step=2, matrices={"b": {"m": math.nan, "n": 2.0}}))
    readings.add(HealthReading(step=3, scalars={"loss": 1.0}))
    assert readings.metrics() == ("a", "b")
    assert readings.rows(max_rows=9)[0] == (1, "m", 1.0, None)
    assert readings.rows(max_rows=9)[2] == (2, "n", None, 2.0)
    assert readings.num_seen == 2


# ---- the table at the end ----


def health(step: int, ranks: list[float], norms: list[float]) -> HealthReading:
    names = [f"h.{i}.attn.weight[q]\x1b" for i in range(len(ranks))]
    return HealthReading(
        step=step,
        matrices={
            "stable_rank": dict(zip(names, ranks, strict=True)),
            "spectral_norm": dict(zip(names, norms, strict=True)),
        },
    )


FIRST = health(0, [20.0] * 8, [1.0] * 8)


def whys(last: HealthReading) -> dict[str, str]:
    """Return the name at the start of each matrix's line, and the rest of it, in order."""
    lines = summary_table(FIRST, last).splitlines()[2:]
    return {line.split(".")[1]: line for line in lines if line.startswith("h.")}


def test_a_change_common_to_all_matrices_is_not_a_finding() -> None:
    text = summary_table(FIRST, health(100, [6.0] * 8, [5.0] * 8))
    assert text.startswith(
        "Health from step 0 to step 100, the worst of 8 matrices first; 0 to look at:\n"
    )
    assert "20.0 → 6.00" in text
    assert "\x1b" not in text


def test_the_worst_come_first_with_the_reason() -> None:
    ranks = [10.0, 9.5, math.nan, 1.5, 10.0, 10.0, 4.0, math.nan]
    norms = [2.0, 2.0, math.nan, 2.0, 30.0, 2.0, 2.0, 0.0]
    found = whys(health(50, ranks, norms))
    assert set(list(found)[:2]) == {"2", "7"}
    assert "not finite: spectral_norm, stable_rank" in found["2"]
    assert "every number is 0" in found["7"]
    # By how far each is beyond its limit: 3.75, 3.33, 1.25 times.
    assert list(found)[2:5] == ["4", "3", "6"]
    assert "σ₁ grew 30 ×, others 2 ×" in found["4"]
    assert "stable rank fell to" in found["3"]
    assert "stable rank fell to 20%, others to" in found["6"]
    assert list(found)[5] == "1"  # then by stable rank


def test_lines_are_counted_and_one_matrix_will_do() -> None:
    last = health(9, [6.0] * 8, [5.0] * 8)
    assert summary_table(FIRST, last, num_lines=3).endswith("\n5 more are not shown.")
    one = HealthReading(step=3, matrices={"stable_rank": {"a": 1.2}})
    assert "one direction holds" in " ".join(summary_table(one, one).split())
    grads = HealthReading(step=3, matrices={"grad_norm": {"a": math.inf, "b": 1.0}})
    assert "1 to look at" in summary_table(grads, grads)
    assert "grad_norm is not finite" in summary_table(grads, grads)
    matrices = {
        "stable_rank": {"a": 3.0, "b": 4.0},
        "spectral_norm": {"a": 2.0, "b": math.nan},
        "spectral_norm_residual": {"a": 0.3, "b": math.nan},
    }
    moving = summary_table(one, HealthReading(step=9, matrices=matrices))
    assert "1.20 → ~3.00" in moving
    assert "  ~2.00" in moving
    assert "~nan" not in moving
    assert moving.endswith("\n~ stale, 1 in all: the matrix moves faster than the estimate of σ₁.")
    lora = HealthReading(step=3, matrices={"stable_rank": {"a": math.nan}})
    assert "no stable rank: zeros, NaN or inf" in summary_table(lora, lora)
    empty = HealthReading(step=3)
    assert summary_table(empty, empty) == "Health at step 3: no matrix was measured."
