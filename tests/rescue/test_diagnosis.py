from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from failing_runs import FAILS_AT

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.records.events import Event, to_json_line
from hf_pss.rescue.diagnosis import Diagnosis, diagnose
from hf_pss.runs.records_files import (
    LogRow,
    RunLog,
    RunRecords,
    read_log,
    read_run_records,
    without_false_zeros,
)

# Of the tiny model, whose loss is summed over 11 of 12 tokens.
STUCK_AT = 3.5


def diagnosed(run: Path, **options: float) -> Diagnosis:
    state = run / "checkpoint-120" / "trainer_state.json"
    return diagnose(
        read_log(state), read_run_records(run), **{"unigram_entropy": STUCK_AT, **options}
    )


@pytest.mark.parametrize("logging_steps", [1, 5])
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("nan", "non_finite"),
        ("huge_rate", "spike"),
        ("decay", "slow_damage"),
        ("stuck", "collapse"),
    ],
)
def test_real_runs(run_of: Callable[..., Path], how: str, kind: str, logging_steps: int) -> None:
    failure = diagnosed(run_of(how, logging_steps)).failure
    assert failure is not None
    if how != "decay" or logging_steps == 1:  # in rows of five steps, this decay is a jump
        assert failure.kind == kind
    if how == "stuck":
        assert failure.onset_step == 0
        return
    # Never later than the first damaged update, or a checkpoint after it would count as sound;
    # earlier by one row, and where a slow rise begins by what the median of 25 steps sees.
    late = 20 if how == "decay" else 0
    assert FAILS_AT - 1 - logging_steps <= failure.onset_step <= FAILS_AT + late


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_sound_run_has_not_failed(run_of: Callable[..., Path], logging_steps: int) -> None:
    assert diagnosed(run_of("sound", logging_steps)).failure is None


def test_a_recovery_is_listed_in_the_notes(run_of: Callable[..., Path]) -> None:
    found = diagnosed(run_of("recovers"))
    assert found.failure is None
    rows = synthetic([3.0] * 60 + [9.0] * 40 + [3.0] * 60)
    found = diagnose(rows, RunRecords())
    assert found.failure is None
    assert "recovered by itself from a spike" in found.notes[0]


@pytest.mark.parametrize(
    ("end", "kind", "onset"),
    [
        ([9.0] * 60, "spike", 2000),
        ([math.nan] * 30, "non_finite", 2000),
        ([3.0] * 60, None, None),
        ([3.0 + 0.01 * i for i in range(200)], "slow_damage", 2010),
    ],
)
def test_the_end_counts_after_however_many_recoveries(
    end: list[float], kind: str | None, onset: int | None
) -> None:
    found = diagnose(synthetic(([3.0] * 20 + [9.0] * 30 + [3.0] * 30) * 25 + end), RunRecords())
    failure = found.failure
    assert (None if failure is None else failure.kind) == kind
    if failure is not None and onset is not None:
        assert abs(failure.onset_step - onset) <= 25
    assert "more often than is listed" in " ".join(found.notes)


def synthetic(
    losses: Sequence[float | None], *, norms: Sequence[float] = (), every: int = 1
) -> RunLog:
    rows = [
        LogRow(every * (i + 1), loss, norms[i] if norms else 1.0) for i, loss in enumerate(losses)
    ]
    step = rows[-1].step if rows else 0
    return RunLog(Path("x"), step, None, None, without_false_zeros(rows))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    norms = [1.0] * 30 + [math.nan] * 5
    found = diagnose(synthetic([3.0] * 30 + [bad] * 5, norms=norms), RunRecords()).failure
    assert found is not None
    assert (found.kind, found.onset_step, found.noticed_step) == ("non_finite", 30, 31)


def test_a_true_loss_of_zero_is_sound() -> None:
    losses = [3.0 * 0.8**i for i in range(60)] + [0.0] * 30
    assert diagnose(synthetic(losses), RunRecords()).failure is None


@pytest.mark.parametrize(
    ("losses", "counts", "expected"),
    [
        ([3.0, 0.0], [None, None], [False, True]),
        ([3.0, 0.005, 0.0], [None] * 3, [False] * 3),
        ([3.0, 0.0, 0.0], [0.0, 2.0, 2.0], [False, True, False]),
        ([3.0, 0.0], [50.0, 3.0], [False, True]),  # the count began again after a resume
    ],
)
def test_a_zero_that_hides_nan_is_put_back(
    losses: list[float], counts: list[float | None], expected: list[bool]
) -> None:
    pairs = enumerate(zip(losses, counts, strict=True))
    rows = [LogRow(step, loss, nonfinite_steps=count) for step, (loss, count) in pairs]
    found = without_false_zeros(rows)
    assert [row.is_false_zero for row in found] == expected
    assert [math.isnan(row.loss or 0.0) for row in found] == expected


def test_one_bad_row_between_sound_ones_is_not_a_failure() -> None:
    assert diagnose(synthetic([3.0] * 30 + [math.nan] + [3.0] * 30), RunRecords()).failure is None


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_one_skipped_overflow_is_not_a_failure_and_five_are(norm: float) -> None:
    """A loss scaler in float16 skips a step now and then, also the last one."""
    losses = [3.0 - 0.05 * i for i in range(30)]
    for every, num_rows in ((1, 5), (20, 3)):
        norms = [1.0] * (31 - num_rows) + [norm] * (num_rows - 1)
        assert diagnose(synthetic(losses, norms=norms, every=every), RunRecords()).failure is None
        norms = [1.0] * (30 - num_rows) + [norm] * num_rows
        failure = diagnose(synthetic(losses, norms=norms, every=every), RunRecords()).failure
        assert failure is not None
        assert (failure.kind, failure.onset_step) == ("non_finite", every * (30 - num_rows))


def test_a_true_zero_among_losses_of_both_signs_is_sound() -> None:
    """The loss of GRPO is exactly 0 if all rewards of a batch are equal."""
    losses = [0.02, -0.01, 0.0, 0.01, 0.0, -0.02] * 10
    assert diagnose(synthetic(losses, norms=[0.3] * 60), RunRecords()).failure is None
    losses = [2.0] * 30 + [0.0] * 10
    failure = diagnose(synthetic(losses, norms=[0.3] * 30 + [0.0] * 10), RunRecords()).failure
    assert failure is not None
    assert failure.kind == "non_finite"


def test_a_nan_gradient_that_pss_skipped_is_not_a_failure() -> None:
    history = synthetic([3.0] * 30, norms=[1.0] * 25 + [math.nan] * 5)
    failure = diagnose(history, RunRecords()).failure
    assert failure is not None
    assert failure.kind == "non_finite"
    judgement = Judgement(Verdict.NON_FINITE, "guard", ("global",))
    skipped = [
        Event.of(judgement, Decision(Action.SKIP_UPDATE, "x"), step=step, loss=3.0)
        for step in range(26, 31)
    ]
    assert diagnose(history, RunRecords(events=tuple(skipped))).failure is None


def test_nonfinite_steps_after_the_last_logged_row_are_a_failure() -> None:
    judgement = Judgement(Verdict.NON_FINITE, "guard", ("global",))
    events = [
        Event.of(judgement, Decision(Action.OBSERVE, "x"), step=step, loss=None)
        for step in range(41, 71)
    ]
    failure = diagnose(synthetic([3.0] * 40), RunRecords(events=tuple(events))).failure
    assert failure is not None
    assert failure.onset_step == 40


def test_a_collapse_of_the_ranks() -> None:
    ranks = [(step, max(0.1, 1 - step / 50)) for step in range(0, 120, 10)]
    stuck = synthetic([5.0 - 0.05 * min(i, 15) for i in range(120)])
    failure = diagnose(stuck, RunRecords(), ranks=ranks).failure
    assert failure is not None
    assert (failure.kind, failure.noticed_step) == ("collapse", 40)
    learning = synthetic([5.0 - 0.02 * i for i in range(120)])
    assert diagnose(learning, RunRecords(), ranks=ranks).failure is None


def test_a_rise_at_the_end_of_the_log() -> None:
    failure = diagnose(synthetic([3.0] * 60 + [9.0] * 5), RunRecords()).failure
    assert failure is not None
    assert (failure.kind, failure.onset_step) == ("spike", 60)
    assert diagnose(synthetic([3.0] * 60 + [9.0] * 4), RunRecords()).failure is None


def test_a_log_without_a_training_loss() -> None:
    found = diagnose(synthetic([]), RunRecords())
    assert found.failure is None
    assert "course is unknown" in found.notes[0]


def test_an_evaluation_that_is_not_finite() -> None:
    rows = (LogRow(10, None, eval_loss=3.0), LogRow(20, None, eval_loss=math.inf))
    failure = diagnose(RunLog(Path("x"), 20, None, None, rows), RunRecords()).failure
    assert failure is not None
    assert (failure.onset_step, failure.noticed_step) == (11, 20)


@pytest.mark.parametrize(
    ("steps", "words"),
    [((9,), "PSS recorded 1 event, at step 9, and"), ((9, 12), "2 events, from step 9 to 12, and")],
)
def test_a_note_counts_events_in_good_english(steps: tuple[int, ...], words: str) -> None:
    judgement = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    events = [
        Event.of(judgement, Decision(Action.OBSERVE, "x"), step=step, loss=3.0) for step in steps
    ]
    records = RunRecords(events=tuple(events))
    assert words in "".join(diagnose(synthetic([3.0] * 40), records).notes)


def test_notes_of_pss(tmp_path: Path) -> None:
    judgement = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    event = Event.of(judgement, Decision(Action.OBSERVE, "x"), step=9, loss=math.inf)
    lines = [to_json_line(event), "{broken", '{"step": NaN}']
    (tmp_path / "pss_events.jsonl").write_text("\n".join(lines))
    health = [
        {"step": 0, "stable_rank": {"a": 10.0, "b": 4.0}},
        {"step": 5, "stable_rank": {"a": 5.0, "b": 1.0, "c": None, "d": 10**400}},
    ]
    (tmp_path / "pss_health.jsonl").write_text("\n".join(map(json.dumps, health)) + "\n[1]\n")
    notes = read_run_records(tmp_path)
    # The words of a hostile file could take many times its size.
    assert notes.events == (replace(event, detector="", fired=(), reason=""),)
    assert notes.rank_ratios == ((0, 1.0), (5, 0.375))
    assert notes.num_unreadable == 3
    assert read_run_records(tmp_path / "nowhere") == RunRecords()


@pytest.mark.parametrize("level", [1e17, -1e17, 1e300, -1e300, 1e-300, 0.0])
def test_a_constant_loss_of_any_size_has_not_risen(level: float) -> None:
    norms = [1.0] * 60
    assert diagnose(synthetic([level] * 60, norms=norms), RunRecords()).failure is None
    found = diagnose(synthetic([level] * 200, norms=[1.0] * 200), RunRecords()).failure
    assert found is None or found.kind == "collapse"  # it has not moved


def test_a_loss_that_cannot_be_averaged_is_not_finite() -> None:
    failure = diagnose(synthetic([3.0] * 30 + [-1.7e308] * 30), RunRecords()).failure
    assert failure is not None
    assert (failure.kind, failure.onset_step) == ("non_finite", 30)


def test_lines_and_names_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pss.runs.records_files.MAX_LINES", 3)
    monkeypatch.setattr("hf_pss.runs.records_files._MOST_MATRICES", 2)
    lines = [json.dumps({"step": i, "stable_rank": {f"w{i}": 4.0}}) for i in range(9)]
    (tmp_path / "pss_health.jsonl").write_text("\n".join(lines))
    assert read_run_records(tmp_path).rank_ratios == ((0, 1.0), (1, 1.0))
