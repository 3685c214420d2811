from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.errors import ConfigurationError
from hf_pss.inspection.live_view import plain_lines
from hf_pss.records.events import Event, to_json_line
from hf_pss.runs.follow import Follower
from hf_pss.runs.records_files import JsonLines, health_line


def spike(step: int, action: Action = Action.OBSERVE) -> Event:
    judgement = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    return Event.of(judgement, Decision(action, "cooldown"), step=step, loss=4.0)


def write_state(folder: Path, step: int, *, max_steps: int = 100, **logs: Any) -> Path:
    path = folder / f"checkpoint-{step}" / "trainer_state.json"
    path.parent.mkdir(exist_ok=True)
    row = {"step": step, "loss": 3.5, "pss/grad_norm_preclip": 0.5, "pss/threshold": 1.5, **logs}
    state = {"global_step": step, "max_steps": max_steps, "log_history": [{"step": 1}, row]}
    path.write_text(json.dumps(state), encoding="utf-8")
    os.utime(path, ns=(step * 10**9,) * 2)
    return path


def test_files_that_come_later(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    state = follower.poll()
    assert state.is_empty
    assert not state.has_ended
    events = JsonLines(tmp_path / "pss_events.jsonl", resumed_step=0)
    events.write_records([spike(3)])
    assert follower.poll().fresh_events == (spike(3),)
    assert follower.poll().fresh_events == ()
    JsonLines(tmp_path / "pss_health.jsonl", resumed_step=0).write(
        [health_line(0, {"a": 9.0}), health_line(10, {"a": 3.0, "b": math.nan})]
    )
    state = follower.poll()
    assert state.reading is not None
    assert state.first_reading is not None
    assert (state.first_reading.step, state.reading.step) == (0, 10)
    assert math.isnan(state.reading.matrices["stable_rank"]["b"])
    write_state(tmp_path, 10)
    state = follower.poll()
    log = state.log
    assert log is not None
    assert (log.step, log.loss, log.grad_norm, log.threshold) == (10, 3.5, 0.5, 1.5)
    assert state.log_source == "checkpoint-10/trainer_state.json"


def test_the_newest_checkpoint_and_one_that_is_half_written(tmp_path: Path) -> None:
    write_state(tmp_path, 10)
    follower = Follower(tmp_path)
    follower.poll()
    path = write_state(tmp_path, 20, loss=math.nan)  # the Trainer writes the word NaN
    log = follower.poll().log
    assert log is not None
    assert math.isnan(log.loss or 0)
    path = write_state(tmp_path, 30)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    state = follower.poll()
    assert state.log == log
    assert state.num_unreadable == 1
    path.write_bytes(whole)
    state = follower.poll()
    assert state.log is not None
    assert state.log.step == 30
    assert state.num_unreadable == 0


def test_a_loss_that_the_trainer_has_filtered_is_not_zero(tmp_path: Path) -> None:
    write_state(tmp_path, 10, loss=0.0, **{"pss/nonfinite_steps": 3})
    log = Follower(tmp_path).poll().log
    assert log is not None
    assert math.isnan(log.loss or 0)


def test_a_resume_supersedes_events(tmp_path: Path) -> None:
    path = tmp_path / "pss_events.jsonl"
    JsonLines(path, resumed_step=0).write_records([spike(3), spike(7)])
    follower = Follower(tmp_path)
    before = follower.poll()
    assert before.num_events == 2
    JsonLines(path, resumed_step=5).write_records([spike(6)])
    state = follower.poll()
    assert state.events == (spike(3), spike(6))
    assert state.fresh_events == (spike(6),)
    assert state.num_events == 2
    lines = list(plain_lines(before, state))
    assert "superseded" in lines[0]
    assert lines[1].startswith("WARN: Step 6: grad norm 9, 9 × its average of 1")


def test_no_event_is_reported_twice_among_hundreds(tmp_path: Path) -> None:
    path = tmp_path / "pss_events.jsonl"
    JsonLines(path, resumed_step=0).write_records([spike(step) for step in range(500)])
    with path.open("a") as file:
        file.write('{"cut": \n')
    follower = Follower(tmp_path)
    state = follower.poll()
    assert (len(state.fresh_events), state.num_unreadable) == (500, 1)
    JsonLines(path, resumed_step=450).write_records([spike(451, Action.SKIP_UPDATE)])
    state = follower.poll()
    assert state.fresh_events == (spike(451, Action.SKIP_UPDATE),)
    assert (state.num_events, state.num_unreadable) == (452, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"step": 1}',
        b'{"step": 1, "step": 2}',
        b'{"step": NaN}',
        b"[" * 100_000,
    ],
)
def test_unreadable_lines_are_counted(line: bytes, tmp_path: Path) -> None:
    event = to_json_line(spike(3)).encode()
    (tmp_path / "pss_events.jsonl").write_bytes(line + b"\n" + event + b"\n" + event[:20])
    state = Follower(tmp_path).poll()
    assert state.events == (spike(3),)
    assert state.num_unreadable == 1


@pytest.mark.parametrize(
    "state", ["[]", "{}", '{"log_history": 3}', '{"log_history": [{"step": "x", "loss": 1}, 7]}']
)
def test_unreadable_states_give_no_log(state: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    found = Follower(tmp_path).poll()
    assert found.log is None
    assert not found.has_ended


def test_the_end_of_a_run(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    write_state(tmp_path, 50)
    assert not follower.poll().has_ended
    write_state(tmp_path, 100)
    assert follower.poll().has_ended


@pytest.mark.parametrize("name", ["pss_events.jsonl", "pss_health.jsonl"])
def test_a_live_run_beside_the_state_of_a_finished_one(name: str, tmp_path: Path) -> None:
    state = write_state(tmp_path, 100)
    path = tmp_path / name
    line = {"pss_events.jsonl": to_json_line(spike(3)), "pss_health.jsonl": health_line(3, {})}
    path.write_text(line[name] + "\n")
    modified = state.stat().st_mtime_ns
    os.utime(path, ns=(modified, modified))
    assert Follower(tmp_path).poll().has_ended
    os.utime(path, ns=(modified + 1_000_000,) * 2)
    assert not Follower(tmp_path).poll().has_ended


def test_a_run_that_has_stopped_itself(tmp_path: Path) -> None:
    write_state(tmp_path, 100)  # of a longer run before
    events = JsonLines(tmp_path / "pss_events.jsonl", resumed_step=0)
    events.write_records([spike(3)])
    follower = Follower(tmp_path)
    assert not follower.poll().has_ended
    events.write_records([spike(7, Action.STOP)])
    assert follower.poll().has_ended
    JsonLines(tmp_path / "pss_health.jsonl", resumed_step=7).write([health_line(8, {})])
    assert not follower.poll().has_ended  # resumed where it stopped


def test_a_stopped_run_that_has_saved_a_later_step_is_live(tmp_path: Path) -> None:
    JsonLines(tmp_path / "pss_events.jsonl", resumed_step=0).write_records([spike(7, Action.STOP)])
    assert Follower(tmp_path).poll().has_ended
    os.utime(write_state(tmp_path, 8))
    assert not Follower(tmp_path).poll().has_ended


def test_a_demos_run(tmp_path: Path) -> None:
    run = tmp_path / "paper" / "seed-0"
    run.mkdir(parents=True)
    row = {"step": 4, "loss": 7.5, "grad_norm_preclip": 2.0, "baseline": None, "threshold": None}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigurationError, match=r"holds 1 of them. Give one: .*paper/seed-0"):
        Follower(tmp_path)
    follower = Follower(run)
    log = follower.poll().log
    assert log is not None
    assert (log.loss, log.grad_norm, log.baseline) == (7.5, 2.0, None)
    (run / "summary.json").write_text("{}")
    assert follower.poll().has_ended


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no folder"):
        Follower(tmp_path / "nowhere")
