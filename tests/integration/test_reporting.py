"""What PSS writes: log scalars, TensorBoard, and JSON-lines files that tell one story."""

from __future__ import annotations

import json
import logging
import math
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import EAGER, events_of, make_trainer, steps_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_pss import PSSCallback, PSSConfig
from hf_pss.records.events import Intervention
from hf_pss.runs.records_files import (
    REPORTED,
    JsonLines,
    health_line,
    log_scalars,
    parse_record,
    read_lines,
)

# Measured: 0.092 MB, of a file of 10 MB with lines of 10 kB.
MAX_RESUME_BYTES = 0.2e6


def lines(*steps: int) -> list[str]:
    return [json.dumps({"step": step}) for step in steps]


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# ---- JsonLines ----


def test_lines_are_appended(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "new" / "e.jsonl", resumed_step=0)
    file.write([])
    assert not (tmp_path / "new").exists()  # nothing happened: no file
    file.write(lines(1, 2))
    file.write(lines(2, 3))
    assert steps_in(tmp_path / "new" / "e.jsonl") == [1, 2, 2, 3]


def test_steps_after_the_resumed_one_are_superseded(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    JsonLines(path, resumed_step=0).write(lines(1, 2, 3, 4))
    JsonLines(path, resumed_step=2).write(lines(3))
    JsonLines(path, resumed_step=2).write(lines(5))
    assert steps_in(path) == [1, 2, 5]
    assert steps_in(tmp_path / "e.superseded.jsonl") == [3, 4, 3]


@pytest.mark.parametrize(
    "rest",
    [b'{"step": 3, "va', b"\xff\xfe", b"[]", b'{"step": "x"}', b"3\n", b"[" * 100_000],
    ids=["cut", "no text", "a list", "no step", "a number", "nested"],
)
def test_what_a_crash_left_is_superseded(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b'{"step": 1}\n' + rest)
    JsonLines(path, resumed_step=9).write(lines(4))
    assert steps_in(path) == [1, 4]
    assert (tmp_path / "e.superseded.jsonl").read_bytes() == rest.rstrip() + b"\n"


def test_a_resume_holds_one_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    text = "x" * 10_000
    path.write_text("".join(json.dumps({"step": i, "x": text}) + "\n" for i in range(1000)))
    tracemalloc.start()
    JsonLines(path, resumed_step=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps_in(path) == list(range(501))
    assert peak < MAX_RESUME_BYTES


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: writes fall short, and then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_costs_its_own_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "e.jsonl"
    file = JsonLines(path, resumed_step=0)
    file.write(lines(1))
    with full_disk(path.stat().st_size + 5):
        file.write(lines(2, 3))
    assert "Cannot write" in caplog.text
    file.write(lines(4))
    assert steps_in(path) == [1, 4]


def test_a_resume_on_a_full_disk_leaves_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x')
    with full_disk(5):
        file = JsonLines(path, resumed_step=9)
    file.write(lines(4))
    assert path.read_text() == '{"step": 1}\n{"step": 2, "x\n{"step": 4}\n'


def test_a_last_line_that_lacks_only_its_end_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    JsonLines(path, resumed_step=2).write(lines(3))
    assert steps_in(path) == [1, 2, 3]


def test_a_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "e.jsonl").mkdir()  # a folder where the file should be
    JsonLines(tmp_path / "e.jsonl", resumed_step=3).write(lines(1))
    (tmp_path / "file").write_text("")
    JsonLines(tmp_path / "file" / "e.jsonl", resumed_step=3).write(lines(1))
    found = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.message.split()[1] for r in found] == ["tidy", "write", "write"]
    assert "Training continues" in caplog.text


def test_a_health_line_is_strict_json() -> None:
    line = health_line(3, {"a": 2.5, "b": math.nan})
    assert json.loads(line) == {"step": 3, "stable_rank": {"a": 2.5, "b": None}}


def test_scalars_get_the_keys_of_the_table() -> None:
    scalars = {"interventions": 2.0, "seconds": 0.5}
    assert log_scalars(scalars) == {"pss/interventions": 2.0}


# ---- in a run ----


def test_a_runs_events_can_be_read_back(tmp_path: Path) -> None:
    trainer = train(tmp_path, EAGER)
    log = read_lines(tmp_path / "pss_events.jsonl", parse_record)
    assert not log.is_cut
    acted = [r for r in log.rows if isinstance(r, Intervention)]
    assert [r.event.step for r in acted] == steps_of(events_of(tmp_path))
    assert trainer.state.log_history[-2]["pss/interventions"] == len(acted)
    for record in acted:
        assert record.event.value > record.event.threshold
        assert {c.status for c in record.matrices} <= {"smoothed", "unchanged"}
        assert all(c.sigma_after <= c.sigma_before for c in record.matrices)


def test_every_key_of_the_table_is_logged_and_no_other(tmp_path: Path) -> None:
    trainer = train(tmp_path, EAGER, save_strategy="no")
    logged = {key for line in trainer.state.log_history for key in line if key.startswith("pss/")}
    assert logged == set(REPORTED)


def test_health_is_written_at_its_rhythm_with_the_start(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", health_every_steps=3)
    trainer = train(tmp_path, config, save_steps=4)
    rows = [json.loads(x) for x in (tmp_path / "pss_health.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6]
    names = {view.name for view in PSSCallback.of(trainer).controller.selection.matrices}
    assert all(set(row["stable_rank"]) == names for row in rows)
    train(tmp_path, config, resume=str(tmp_path / "checkpoint-4"))
    again = [json.loads(x) for x in (tmp_path / "pss_health.jsonl").read_text().splitlines()]
    assert again == rows


def test_a_new_run_in_an_old_folder_supersedes_it(tmp_path: Path) -> None:
    train(tmp_path, EAGER, save_strategy="no")
    old = events_of(tmp_path)
    train(tmp_path, EAGER, save_strategy="no", max_steps=3)
    assert max(steps_of(events_of(tmp_path))) <= 3
    assert events_of(tmp_path, "pss_events.superseded.jsonl") == old


def test_events_that_cannot_be_written_do_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pss_events.jsonl").mkdir()
    trainer = train(tmp_path, EAGER)
    assert trainer.state.global_step == 8
    assert "Cannot write" in caplog.text


def test_an_intervention_is_one_warning_for_people(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, EAGER, save_strategy="no")
    said = [r.getMessage() for r in caplog.records if r.name == "hf_pss.trainer.recorder"]
    assert len(said) == len(steps_of(events_of(tmp_path)))
    assert "smoothing (clip) changed 6 of 6 matrices" in said[0]


def test_the_floor_warns_once_then_it_is_upkeep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PSSConfig.preset("floor", floor_ratio=1.3, check_every_steps=1)
    train(tmp_path, config, save_strategy="no")
    assert len(steps_of(events_of(tmp_path))) > 1
    _, said = [r.getMessage() for r in caplog.records if r.name.startswith("hf_pss")]
    assert "PSS, step 1: stable rank" in said
    assert "below its floor of" in said


def test_tensorboard_receives_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = make_trainer(tmp_path, EAGER, report_to="tensorboard", save_strategy="no")
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events.out.*")}
    board = EventAccumulator(str(folder))
    board.Reload()
    written = {tag for tag in board.Tags()["scalars"] if "pss/" in tag}
    assert written == {f"train/{key}" for key in REPORTED}
    logged = [line["pss/interventions"] for line in trainer.state.log_history[:-1]]
    assert [e.value for e in board.Scalars("train/pss/interventions")] == logged
