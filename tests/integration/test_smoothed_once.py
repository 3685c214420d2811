"""``smooth_on_resume`` repairs what it was given, and not what the repaired run saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoint_differences, events_of, train

from hf_pss import PSSConfig

STEPS = {"max_steps": 8, "save_steps": 2}
RESCUE = PSSConfig.preset("paper", detectors=(), smooth_on_resume=True, smoothing="clip")


def run(folder: Path, resume: Any = None, pss: PSSConfig = RESCUE, **options: Any) -> None:
    train(folder, pss, resume=resume, **{**STEPS, **options})


def smoothed_at(folder: Path) -> list[int]:
    return [event["step"] for event in events_of(folder) if event["detector"] == "resume"]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    run(tmp_path / "broken")
    assert smoothed_at(tmp_path / "broken") == []  # it began at step 0
    return tmp_path / "broken" / "checkpoint-2"


def test_an_interruption_does_not_smooth_again(
    broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "straight", broken)
    run(tmp_path / "halves", broken)
    assert "were smoothed when" not in caplog.text
    run(tmp_path / "halves", tmp_path / "halves" / "checkpoint-6")
    assert "were smoothed when this run was first resumed" in caplog.text
    for name in ("straight", "halves"):
        assert smoothed_at(tmp_path / name) == [2]
    ends = [tmp_path / name / "checkpoint-8" for name in ("straight", "halves")]
    assert not checkpoint_differences(*ends)


def test_another_rescue_does(broken: Path, tmp_path: Path) -> None:
    run(tmp_path / "first", broken)
    run(tmp_path / "second", tmp_path / "first" / "checkpoint-6")
    assert smoothed_at(tmp_path / "second") == [6]


def test_in_place_from_before_it_does(broken: Path) -> None:
    run(broken.parent, broken)
    assert smoothed_at(broken.parent) == [2]
    run(broken.parent, broken)  # of which nothing says that it was smoothed
    assert smoothed_at(broken.parent) == [2, 2]
    run(broken.parent, broken.with_name("checkpoint-4"))
    assert smoothed_at(broken.parent) == [2, 2]


def test_a_resume_without_the_option_keeps_the_record(broken: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", broken)
    run(
        tmp_path / "run", tmp_path / "run" / "checkpoint-4", PSSConfig.preset("paper", detectors=())
    )
    run(tmp_path / "run", tmp_path / "run" / "checkpoint-6")
    assert smoothed_at(tmp_path / "run") == [2]


def test_a_record_that_is_none_smooths(broken: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", broken)
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    data = json.loads(state.read_text())
    data["stateful_callbacks"]["PSSCallback"]["attributes"]["smoothed_in"] = ["x"]
    state.write_text(json.dumps(data))
    run(tmp_path / "run", state.parent)
    assert smoothed_at(tmp_path / "run") == [2, 4]
