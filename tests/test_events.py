from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.errors import StateError
from hf_pss.records.events import (
    Event,
    EventKind,
    Intervention,
    MatrixChange,
    Record,
    from_json_line,
    to_json_line,
)
from hf_pss.runs.records_files import parse_record, read_lines

numbers = st.none() | st.floats()
counts = st.integers(0, 2**60)
names = st.lists(st.text(max_size=8), max_size=3).map(tuple)
events = st.builds(
    Event,
    step=counts,
    kind=st.sampled_from(EventKind),
    detector=st.text(max_size=8),
    value=numbers,
    baseline=numbers,
    threshold=numbers,
    fired=names,
    new_level=names,
    loss=numbers,
    decision=st.sampled_from(Action),
    reason=st.text(max_size=8),
)
changes = st.builds(
    MatrixChange,
    name=st.text(max_size=8),
    shape=st.tuples(counts, counts),
    status=st.text(max_size=8),
    rank=st.none() | counts,
    sigma_before=numbers,
    sigma_after=numbers,
    stable_rank_before=numbers,
    stable_rank_after=numbers,
)
records = st.one_of(
    events,
    st.builds(
        Intervention,
        event=events,
        smoothing=st.text(max_size=8),
        seconds=st.floats(min_value=0.0),
        num_selected=st.none() | st.integers(0, 1000),
        matrices=st.lists(changes, max_size=3).map(tuple),
    ),
)

EVENT = Event.of(
    Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.5, 1.25, 3.125),
    Decision(Action.OBSERVE, "cooldown"),
    step=120,
    loss=math.inf,
)
INTERVENTION = Intervention(
    event=dataclasses.replace(EVENT, decision=Action.ACT, reason="grad_norm_ratio", loss=4.5),
    smoothing="clip",
    seconds=0.25,
    matrices=(
        MatrixChange("h.0.attn.c_attn[q]", (64, 64), "smoothed", 3, 8.0, 2.0, 3.5, 20.0),
        MatrixChange("h.0.mlp.c_fc", (256, 64), "non_finite"),
        MatrixChange("h.1.mlp.c_fc", (256, 64), "smoothed", 1, math.inf, math.nan, 1.0, None),
    ),
)


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not strict JSON")


def strict(line: str) -> dict[str, Any]:
    parsed = json.loads(line, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


@settings(max_examples=300, deadline=None)
@given(records)
def test_every_record_comes_back_exactly_from_one_line_of_strict_json(record: Record) -> None:
    line = to_json_line(record)
    assert "\n" not in line
    strict(line)
    # repr compares floats bit for bit, distinguishes -0.0 from 0.0, and NaN equals itself there.
    assert repr(from_json_line(line)) == repr(record)


def test_a_record_of_an_older_version_has_no_number_of_selected_matrices() -> None:
    values = strict(to_json_line(INTERVENTION))
    del values["num_selected"]
    assert repr(from_json_line(json.dumps(values))) == repr(INTERVENTION)


@pytest.mark.parametrize("record", [EVENT, INTERVENTION])
def test_a_record_of_an_older_version_does_not_say_whether_the_update_was_applied(
    record: Record,
) -> None:
    values = strict(to_json_line(record))
    del values["update_applied"]
    assert repr(from_json_line(json.dumps(values))) == repr(record)
    with pytest.raises(StateError, match=r"'update_applied' of .*true or false"):
        from_json_line(json.dumps({**values, "update_applied": 1}))


def test_event_on_disk() -> None:
    assert strict(to_json_line(EVENT)) == {
        "version": 1,
        "kind": "spike",
        "step": 120,
        "detector": "grad_norm_ratio",
        "value": 9.5,
        "baseline": 1.25,
        "threshold": 3.125,
        "fired": ["global"],
        "new_level": [],
        "loss": None,
        "update_applied": None,
        "decision": "observe",
        "reason": "cooldown",
        "non_finite": {"loss": "inf"},
    }


def test_intervention_on_disk() -> None:
    found = strict(to_json_line(INTERVENTION))
    assert (found["version"], found["kind"], found["trigger"]) == (1, "intervention", "spike")
    assert (found["step"], found["loss"], found["smoothing"], found["seconds"]) == (
        120,
        4.5,
        "clip",
        0.25,
    )
    assert found["matrices"][0] == {
        "name": "h.0.attn.c_attn[q]",
        "shape": [64, 64],
        "status": "smoothed",
        "rank": 3,
        "sigma_before": 8.0,
        "sigma_after": 2.0,
        "stable_rank_before": 3.5,
        "stable_rank_after": 20.0,
    }
    assert found["matrices"][2]["sigma_before"] is None
    assert found["matrices"][2]["non_finite"] == {"sigma_before": "inf", "sigma_after": "nan"}


@pytest.mark.parametrize(
    ("verdict", "detector", "kind"),
    [
        (Verdict.SPIKE, "grad_norm_ratio", EventKind.SPIKE),
        (Verdict.SPIKE, "stable_rank_floor", EventKind.FLOOR),
        (Verdict.SPIKE, "stable_rank_drop", EventKind.DROP),
        (Verdict.NON_FINITE, "stable_rank_drop", EventKind.NON_FINITE),
    ],
)
def test_kind_follows_from_the_judgement(verdict: Verdict, detector: str, kind: EventKind) -> None:
    judgement = Judgement(verdict, detector, ("w",))
    event = Event.of(judgement, Decision(Action.ACT, detector), step=1, loss=None)
    assert event.kind is kind


def changed(record: Record, **change: Any) -> str:
    parsed = {**strict(to_json_line(record)), **change}
    return json.dumps({k: v for k, v in parsed.items() if v is not ...})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[]",
        "NaN",
        '{"version": 1}',
        "[" * 100_000,
        to_json_line(EVENT)[:-9],
        changed(EVENT, version=2),
        changed(EVENT, version=True),
        changed(EVENT, version=...),
        changed(EVENT, kind="alarm"),
        changed(EVENT, kind="rescue"),
        changed(EVENT, kind=...),
        changed(EVENT, kind=["spike"]),
        changed(EVENT, step=-1),
        changed(EVENT, step=1.0),
        changed(EVENT, step=True),
        changed(EVENT, value="9.5"),
        changed(EVENT, value=...),
        changed(EVENT, value=math.nan),
        changed(EVENT, value=10**400),
        changed(EVENT, surprise=1),
        changed(EVENT, fired="global"),
        changed(EVENT, fired=[1]),
        changed(EVENT, decision="panic"),
        changed(EVENT, non_finite={"value": "inf"}),
        changed(EVENT, non_finite={"loss": "huge"}),
        changed(EVENT, non_finite={"loss": 1.0}),
        changed(EVENT, non_finite={"step": "inf"}),
        changed(EVENT, non_finite={"other": "inf"}),
        changed(EVENT, non_finite=None),
        changed(INTERVENTION, trigger=...),
        changed(INTERVENTION, trigger="intervention"),
        changed(INTERVENTION, seconds=None),
        changed(INTERVENTION, matrices={}),
        changed(INTERVENTION, matrices=[1]),
        changed(INTERVENTION, matrices=[{"name": "w"}]),
        to_json_line(EVENT).replace("9.5", "1e999"),
    ],
)
def test_bad_line_is_refused_and_its_beginning_quoted(line: str) -> None:
    with pytest.raises(StateError) as caught:
        from_json_line(line)
    assert repr(line[:40])[1:-1] in str(caught.value)


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_reads_a_file(tmp_path: Path) -> None:
    lines = [to_json_line(record) for record in (EVENT, INTERVENTION)]
    log = read_lines(write(tmp_path / "events.jsonl", *lines), parse_record)
    assert [to_json_line(record) for record in log.rows] == lines
    assert not log.is_cut


def test_empty_file_has_no_records(tmp_path: Path) -> None:
    log = read_lines(write(tmp_path / "events.jsonl", end=""), parse_record)
    assert (log.rows, log.is_cut) == ((), False)


def test_a_truncated_file_keeps_its_complete_lines_and_is_marked(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", *[to_json_line(EVENT)] * 3)
    whole = path.read_bytes()
    length = len(whole) // 3
    for cut in range(2 * length, len(whole)):
        path.write_bytes(whole[:cut])
        log = read_lines(path, parse_record)
        # One byte short of the end only the line's end is missing.
        complete = cut == len(whole) - 1
        assert len(log.rows) == (3 if complete else 2)
        assert log.is_cut == (not complete and cut != 2 * length)


def test_cut_inside_a_character_is_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(to_json_line(EVENT).encode() + b'\n{"version": 1, "reason": "\xcf')
    assert read_lines(path, parse_record).is_cut


@pytest.mark.parametrize("line", ['{"vers', "[]", "[" * 100_000, changed(EVENT, version=2)])
def test_bad_lines_are_counted_and_leave_the_others(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", to_json_line(EVENT), line, to_json_line(EVENT), line)
    log = read_lines(path, parse_record)
    assert (log.rows, log.num_unreadable, log.is_cut) == ((EVENT, EVENT), 2, False)
