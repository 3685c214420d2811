"""`hf-pss rescue` on a run of `hf-pss train`, and on what nobody should be given."""

from __future__ import annotations

import json
import math
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
from hf_pss.rescue.command import recorded_entropy


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


def test_seed_and_schedule_are_in_the_command(run: Run, tmp_path: Path) -> None:
    (text := tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    given = ["--seed", "7", "--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "1"]
    given += ["--lr_scheduler_kwargs", '{"num_decay_steps": 2}', "--adam_beta2", "0.98"]
    words = (*given, "--dataset", text, "--save_steps", "2", "--output_dir", tmp_path / "run")
    assert run("train", *TINY, *SHORT, *words).exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    command = json.loads(run("rescue", tmp_path / "run", "--json").stdout)["resume"]["command"]
    for name, value in zip(given[::2], given[1::2], strict=True):
        assert command[command.index(name) + 1] in (value, f"{value}.0")  # 1 warm-up step is 1.0
    assert run(*command[1:], "--use_cpu").exit_code == 0
    assert (tmp_path / "run-rescued" / "checkpoint-5").is_dir()


def test_the_entropy_of_the_text_is_known(run: Run, run_dir: Path) -> None:
    kept = json.loads((run_dir / "hf_pss_options.json").read_text())["unigram_entropy"]
    assert 0 < kept < math.log(json.loads((run_dir / "config.json").read_text())["vocab_size"])
    assert recorded_entropy(run_dir) == kept


@pytest.mark.parametrize("value", ["Infinity", "-1.0", "1e9", "true", '"4"', "null", "[]"])
def test_an_entropy_that_is_none_is_not_taken(tmp_path: Path, value: str) -> None:
    (tmp_path / "hf_pss_options.json").write_text(f'{{"unigram_entropy": {value}}}')
    assert recorded_entropy(tmp_path) is None


def test_told_when_it_failed(run: Run, run_dir: Path) -> None:
    data = json.loads(run("rescue", run_dir, "--json", "--failed-at", "3").stdout)
    assert data["failure"]["onset_step"] == 3
    assert data["is_last_resort"] is True
    assert "--pss_moments" in data["resume"]["options"]


def test_a_run_at_its_end_is_told_apart(run: Run, run_dir: Path) -> None:
    (run_dir / "checkpoint-5" / "model.safetensors").write_bytes(
        (run_dir / "checkpoint-4" / "model.safetensors").read_bytes()
    )
    assert "has taken all its steps" in " ".join(run("rescue", run_dir).stdout.split())


@pytest.mark.parametrize(("rates", "is_said"), [((0.1, 0.2), True), ((0.2, 0.1), False)])
def test_a_rate_that_will_rise_again_is_told(
    run: Run, run_dir: Path, rates: tuple[float, float], is_said: bool
) -> None:
    path = run_dir / "trainer_state.json"
    state = json.loads(path.read_text())
    losses = [row for row in state["log_history"] if "loss" in row]
    losses[-2]["learning_rate"], losses[-1]["learning_rate"] = rates
    path.write_text(json.dumps(state))
    said = " ".join(run("rescue", run_dir).stdout.split())
    assert ("rises after this checkpoint, from 0.1 to 0.2 at step 5" in said) == is_said


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
    for training in (["a"], {"seed": "--report_to=all"}, {"lr_scheduler_type": ["a"]}):
        path.write_text(json.dumps({**kept, "training": training}))
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
