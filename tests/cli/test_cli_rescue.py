"""`hf-pss rescue` on a run of `hf-pss train`, and on what nobody should be given."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from commandline import PROSE, SHORT, TINY, Run
from safetensors.torch import load_file, save_file

from hf_pss.cli.rescue import Smoothing
from hf_pss.config import SmoothingName


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("trained") / "run"]


@pytest.fixture
def run_dir(run: Run, trained: list[Path], tmp_path: Path) -> Path:
    """Five steps with checkpoints at 4 and 5; the weights of the newest hold NaN."""
    (made,) = trained
    if not made.exists():
        text = made.with_name("prose.txt")
        text.write_text(PROSE, encoding="utf-8")
        words = ("--save_steps", "2", "--logging_steps", "1", "--output_dir", made)
        words += ("--dataset", text)
        result = run("train", *TINY, *SHORT, *words)
        assert result.exit_code == 0, result.output
    copy = Path(shutil.copytree(made, tmp_path / "run"))
    weights = load_file(copy / "checkpoint-5" / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(weights, copy / "checkpoint-5" / "model.safetensors", {"format": "pt"})
    return copy


def test_what_it_says(run: Run, run_dir: Path) -> None:
    result = run("rescue", run_dir)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "No failure was found in the log" in text
    assert "→ checkpoint-4" in text
    assert "passed over checkpoint-5: NaN or inf in 1 of its tensors" in text
    assert f"hf-pss train --resume_from_checkpoint {run_dir / 'checkpoint-4'}" in text


def test_the_printed_command_goes_on(run: Run, run_dir: Path) -> None:
    data = json.loads(run("rescue", run_dir, "--json").stdout)
    command = data["resume"]["command"]
    assert command[:2] == ["hf-pss", "train"]
    assert command[command.index("--max_steps") + 1] == "5"
    words = command[2:]
    words[words.index("--max_steps") + 1] = "7"
    result = run("train", *words, "--use_cpu")
    assert result.exit_code == 0, result.output
    resumed = run_dir.with_name("run-rescued")
    events = (resumed / "pss_events.jsonl").read_text().splitlines()
    assert json.loads(events[0])["detector"] == "resume"
    state = json.loads((resumed / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["global_step"] == 7


def test_json(run: Run, run_dir: Path) -> None:
    result = run("rescue", run_dir, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["failure"] is None
    assert data["chosen"] == str(run_dir / "checkpoint-4")
    assert [one["verdict"] for one in data["checkpoints"]] == ["healthy", "damaged"]
    assert data["checkpoints"][-1]["finite"] is False


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [("none", None), ("log", "--pss_smoothing"), ("floor", "--pss_floor_reference")],
)
def test_smoothing_is_chosen(run: Run, run_dir: Path, smoothing: str, expected: str | None) -> None:
    words = run("rescue", run_dir, "--json", "--smoothing", smoothing).stdout
    options = json.loads(words)["resume"]["options"]
    assert any(word.startswith("--pss_") for word in options) == (expected is not None)
    assert expected is None or expected in options


def test_an_unknown_launch_is_a_template(run: Run, run_dir: Path) -> None:
    (run_dir / "hf_pss_options.json").unlink()
    text = run("rescue", run_dir).stdout
    line = next(line for line in text.splitlines() if "<your launch command>" in line)
    assert "--pss_smooth_on_resume true" in line
    assert "PSSTrainingArguments(" in text
    assert shlex.split(line.strip())[0] == "<your"


def test_options_that_no_run_wrote_are_not_printed(run: Run, run_dir: Path) -> None:
    path = run_dir / "hf_pss_options.json"
    kept = json.loads(path.read_text())
    for value in ("\x1b[2J", "--report_to=all", ["a"]):
        path.write_text(json.dumps({**kept, "dataset": value}))
        result = run("rescue", run_dir, "--json")
        assert json.loads(result.stdout)["resume"]["command"] is None


def test_a_picture(run: Run, run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "failure.png"
    result = run("rescue", run_dir, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert result.stdout.splitlines()[-1] == str(path)
    assert run("rescue", run_dir, "--plot", tmp_path).exit_code == 2


def test_none_usable_is_exit_code_1(run: Run, run_dir: Path) -> None:
    for folder in run_dir.glob("checkpoint-*"):
        (folder / "scheduler.pt").unlink()
    result = run("rescue", run_dir)
    assert result.exit_code == 1
    assert "none is complete and finite" in result.stdout
    assert "scheduler.pt is missing" in " ".join(result.stdout.split())


def test_nothing_to_read_is_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trainer_state.json").write_text('{"global_step": 1')
    for name in ("nowhere", "empty", "broken"):
        result = run("rescue", tmp_path / name)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_names_cannot_command_the_terminal(run: Run, run_dir: Path) -> None:
    weights = load_file(run_dir / "checkpoint-5" / "model.safetensors")
    evil = {"a.0.\x1b[2J\u202eb.weight": torch.full((8, 8), torch.nan), **weights}
    save_file(evil, run_dir / "checkpoint-5" / "model.safetensors", {"format": "pt"})
    result = run("rescue", run_dir)
    assert "\x1b[2J" not in result.stdout
    assert "\u202e" not in result.stdout


def test_a_repaired_copy_goes_on(run: Run, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired"
    words = ("--write", out, "--moments", "reset", "--lr-scale", "0.5", "--allow-pickle")
    result = run("rescue", run_dir, *words, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["written"]["path"] == str(out)
    command = data["resume"]["command"]
    assert str(out) in command
    assert "--pss_smooth_on_resume" not in command  # it is done
    command[command.index("--max_steps") + 1] = "6"
    assert run("train", *command[2:], "--use_cpu").exit_code == 0
    shown = run("rescue", run_dir, "--write", tmp_path / "again")
    assert "matrices" in shown.stdout
    assert f"Written: {tmp_path / 'again'}" in " ".join(shown.stdout.split())


def test_nothing_is_written_elsewhere(run: Run, run_dir: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run("rescue", run_dir)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "words",
    [
        ("--moments", "reset"),
        ("--lr-scale", "0.5"),
        ("--skip-batches", "3"),
        ("--write", "out", "--lr-scale", "0"),
        ("--write", "out", "--lr-scale", "nan"),
        ("--write", "out", "--lr-scale", "0.5"),
        ("--write", "run"),
        ("--write", "no/parent"),
    ],
)
def test_options_that_are_refused(run: Run, run_dir: Path, words: tuple[str, ...]) -> None:
    result = run("rescue", run_dir, *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert not Path("out").exists()


def test_help_teaches(run: Run) -> None:
    text = " ".join(run("rescue", "--help").output.split())
    for words in (
        "--plot",
        "--json",
        "--smoothing",
        "--write",
        "--allow-pickle",
        "Exit codes",
        "Examples",
        "pickle",
    ):
        assert words in text


def test_every_smoothing_function_of_a_run_can_be_named() -> None:
    words = {word.value for word in Smoothing}
    assert words == {*get_args(SmoothingName), "floor", "none"}
