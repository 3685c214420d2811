"""`hf-pss rescue` on a run of `hf-pss train`, and on what nobody should be given."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from commandline import PROSE, SHORT, TINY, Run
from helpers import opens_pickles
from safetensors.torch import load_file, save_file

from hf_pss.cli.parsing import parse_plan
from hf_pss.cli.rescue_command import Smoothing
from hf_pss.config import SmoothingName
from hf_pss.records.spikes import SpikeEvidence, spike_line
from hf_pss.runs.folder import SPIKES_FILE
from hf_pss.runs.options import recorded_entropy


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


def test_the_report_names_failure_checkpoint_and_command(run: Run, run_dir: Path) -> None:
    result = run("rescue", run_dir)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "No failure was found in the log" in text
    assert "→ checkpoint-4" in text
    assert "passed over checkpoint-5: NaN or inf in 1 of its tensors" in text
    assert f"hf-pss train --resume_from_checkpoint {run_dir / 'checkpoint-4'}" in text


def test_the_printed_command_continues_the_run(run: Run, run_dir: Path) -> None:
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
    # The run was healthy, so nothing was smoothed on resume. The floor that it got acts later.
    assert {json.loads(event)["detector"] for event in events} == {"stable_rank_floor"}
    state = json.loads((resumed / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["global_step"] == 7


def test_the_command_has_every_option_that_the_run_depends_on(run: Run, tmp_path: Path) -> None:
    (text := tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    given = ["--seed", "7", "--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "1"]
    given += ["--lr_scheduler_kwargs", '{"num_decay_steps": 2}', "--adam_beta2", "0.98"]
    given += ["--pss_optim", "muon", "--pss_optim_args", "others_lr=0.001"]
    given += ["--label_smoothing_factor", "0.1", "--pss_cooldown_steps", "3"]
    words = (*given, "--dataset", text, "--save_steps", "2", "--output_dir", tmp_path / "run")
    assert run("train", *TINY, *SHORT, *words).exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    command = json.loads(run("rescue", tmp_path / "run", "--json").stdout)["resume"]["command"]
    for name, value in zip(given[::2], given[1::2], strict=True):
        assert command[command.index(name) + 1] in (value, f"{value}.0")  # 1 warm-up step is 1.0
    assert run(*command[1:], "--use_cpu").exit_code == 0
    assert (tmp_path / "run-rescued" / "checkpoint-5").is_dir()


@pytest.mark.slow
def test_two_processes_continue_as_two(run: Run, tmp_path: Path) -> None:
    (text := tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    words = (*TINY, *SHORT, "--dataset", text, "--save_steps", "2", "--output_dir", tmp_path / "a")
    programs = Path(sys.executable).parent
    launcher = [str(programs / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    here = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    first = [*launcher, "hf-pss", "train", *map(str, words)]
    subprocess.run(first, check=True, env=here, capture_output=True)
    shutil.rmtree(tmp_path / "a" / "checkpoint-5")
    command = json.loads(run("rescue", tmp_path / "a", "--json").stdout)["resume"]["command"]
    subprocess.run(command, check=True, env=here, capture_output=True, cwd="/")
    saved = {path.name for path in (tmp_path / "a-rescued" / "checkpoint-5").glob("rng*")}
    assert saved == {"rng_state_0.pth", "rng_state_1.pth"}
    state = json.loads((tmp_path / "a-rescued" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 4


def test_the_entropy_of_the_text_is_read_from_the_run(run: Run, run_dir: Path) -> None:
    kept = json.loads((run_dir / "hf_pss_options.json").read_text())["unigram_entropy"]
    assert 0 < kept < math.log(json.loads((run_dir / "config.json").read_text())["vocab_size"])
    assert recorded_entropy(run_dir) == kept


@pytest.mark.parametrize("value", ["Infinity", "-1.0", "1e9", "true", '"4"', "null", "[]"])
def test_an_impossible_entropy_is_ignored(tmp_path: Path, value: str) -> None:
    (tmp_path / "hf_pss_options.json").write_text(f'{{"unigram_entropy": {value}}}')
    assert recorded_entropy(tmp_path) is None


def test_failed_at_overrides_the_detected_step(run: Run, run_dir: Path) -> None:
    data = json.loads(run("rescue", run_dir, "--json", "--failed-at", "3").stdout)
    assert data["failure"]["onset_step"] == 3
    assert data["is_last_resort"] is True
    assert "--pss_moments" in data["resume"]["options"]


def test_a_finished_run_is_reported_as_such(run: Run, run_dir: Path) -> None:
    (run_dir / "checkpoint-5" / "model.safetensors").write_bytes(
        (run_dir / "checkpoint-4" / "model.safetensors").read_bytes()
    )
    text = " ".join(run("rescue", run_dir).stdout.split())
    assert "has completed all its steps" in text
    assert "--max_steps <more than 5>" in text


@pytest.mark.parametrize(("rates", "is_said"), [((0.1, 0.2), True), ((0.2, 0.1), False)])
def test_a_rate_that_will_rise_again_is_reported(
    run: Run, run_dir: Path, rates: tuple[float, float], is_said: bool
) -> None:
    path = run_dir / "trainer_state.json"
    state = json.loads(path.read_text())
    losses = [row for row in state["log_history"] if "loss" in row]
    losses[-2]["learning_rate"], losses[-1]["learning_rate"] = rates
    path.write_text(json.dumps(state))
    said = " ".join(run("rescue", run_dir).stdout.split())
    assert ("rises after this checkpoint, from 0.1 to 0.2 at step 5" in said) == is_said


def test_json_holds_the_report_and_the_command(run: Run, run_dir: Path) -> None:
    result = run("rescue", run_dir, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["failure"] is None
    assert data["chosen"] == str(run_dir / "checkpoint-4")
    assert [one["verdict"] for one in data["checkpoints"]] == ["healthy", "damaged"]
    assert data["checkpoints"][-1]["finite"] is False


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        ("none", "--pss_observe_only true"),
        (
            "log",
            "--pss_preset paper --pss_trial spikes --pss_smoothing log --pss_smooth_on_resume true",
        ),
        ("floor", "--pss_preset floor --pss_floor_reference start"),
    ],
)
def test_smoothing_option_reaches_the_command(
    run: Run, run_dir: Path, smoothing: str, expected: str
) -> None:
    words = run("rescue", run_dir, "--json", "--smoothing", smoothing).stdout
    options = json.loads(words)["resume"]["options"]
    assert " ".join(options[4:]) == expected


def test_without_smoothing_nothing_is_smoothed(run: Run, run_dir: Path) -> None:
    words = run("rescue", run_dir, "--json", "--smoothing", "none").stdout
    command = json.loads(words)["resume"]["command"]
    assert parse_plan(command[2:]).arguments.pss_config().observe_only


def test_an_unknown_launch_gives_a_template(run: Run, run_dir: Path) -> None:
    (run_dir / "hf_pss_options.json").unlink()
    text = run("rescue", run_dir).stdout
    line = next(line for line in text.splitlines() if "<your launch command>" in line)
    assert "--pss_floor_reference start" in line
    assert "--pss_smooth_on_resume" not in line  # its own floor changes nothing
    assert "PSSTrainingArguments(" in text
    assert shlex.split(line.strip())[0] == "<your"


def test_options_that_no_run_wrote_are_not_printed(run: Run, run_dir: Path) -> None:
    path = run_dir / "hf_pss_options.json"
    kept = json.loads(path.read_text())
    for value in ("\x1b[2J", "--report_to=all", ["a"]):
        of_paths = {**kept, "paths": {"dataset": value}}
        path.write_text(json.dumps({**kept, "dataset": value, "paths": {}}))
        assert json.loads(run("rescue", run_dir, "--json").stdout)["resume"]["command"] is None
        path.write_text(json.dumps(of_paths))
        result = run("rescue", run_dir, "--json")
        assert json.loads(result.stdout)["resume"]["command"] is None
    for training in (["a"], {"seed": "--report_to=all"}, {"lr_scheduler_type": ["a"]}):
        path.write_text(json.dumps({**kept, "training": training}))
        result = run("rescue", run_dir, "--json")
        assert json.loads(result.stdout)["resume"]["command"] is None


def test_a_lower_rate_needs_no_copy(run: Run, run_dir: Path) -> None:
    found = json.loads(run("rescue", run_dir, "--lr-scale", "0.5", "--json").stdout)
    words = found["resume"]["options"]
    assert words[words.index("--pss_lr_scale") + 1] == "0.5"
    said = " ".join(run("rescue", run_dir, "--lr-scale", "0.5").output.split())
    assert "0.5 times the rates that it had" in said


def test_html_writes_the_post_mortem_of_a_spike(run: Run, run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "spike.html"
    result = run("rescue", run_dir, "--html", path)
    assert result.exit_code == 2
    assert "holds no _pss_spikes.jsonl" in result.stderr
    assert not path.exists()
    evidence = SpikeEvidence(4, {"grad_norm": {"h.0.w": 9.0}}, (2, 0), texts=("some prose",))
    (run_dir / SPIKES_FILE).write_text(spike_line(evidence) + "\n")
    result = run("rescue", run_dir, "--html", path)
    assert result.exit_code == 0, result.output
    assert "some prose" in path.read_text(encoding="utf-8")
    assert "Step 4 spiked" in result.stdout
    assert result.stdout.splitlines()[-1] == str(path)
    found = json.loads(run("rescue", run_dir, "--json").stdout)["post_mortem"]
    assert found["matrices"][0]["grad_norm"] == {"value": 9.0, "median": None}
    assert found["indices"] == [2, 0]


def test_plot_writes_a_picture(run: Run, run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "failure.png"
    result = run("rescue", run_dir, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert result.stdout.splitlines()[-1] == str(path)
    assert run("rescue", run_dir, "--plot", tmp_path).exit_code == 2
    shard = next(run_dir.rglob("model.safetensors"))
    before = shard.read_bytes()
    result = run("rescue", run_dir, "--plot", shard)
    assert result.exit_code == 2
    assert "does not end in .png and is left alone" in result.stderr
    assert shard.read_bytes() == before


def test_without_matplotlib_the_report_is_printed_before_the_error(
    run: Run, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hf_pss.view.canvas", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("rescue", run_dir, "--plot", "failure.png")
    assert result.exit_code == 2
    assert "Chosen: checkpoint-" in result.stdout
    assert "pip install matplotlib jinja2" in result.stderr


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


def test_control_characters_in_names_are_escaped(run: Run, run_dir: Path) -> None:
    weights = load_file(run_dir / "checkpoint-5" / "model.safetensors")
    evil = {"a.0.\x1b[2J\u202eb.weight": torch.full((8, 8), torch.nan), **weights}
    save_file(evil, run_dir / "checkpoint-5" / "model.safetensors", {"format": "pt"})
    result = run("rescue", run_dir)
    assert "\x1b[2J" not in result.stdout
    assert "\u202e" not in result.stdout


@opens_pickles
def test_a_repaired_copy_can_be_continued(run: Run, run_dir: Path, tmp_path: Path) -> None:
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
    # The copy carries the options of the run: they are compared, and kept again.
    folders = (run_dir, out, tmp_path / "run-rescued")
    kept = [json.loads((folder / "hf_pss_options.json").read_text()) for folder in folders]
    assert kept[2]["training"].pop("pss_lr_scale") == 0.5  # of the rates that are given
    assert kept[0] == kept[1] == kept[2]
    other = [*command[2:], "--context_length", "16", "--output_dir", tmp_path / "other"]
    assert "The run that you resume has --context_length 32" in run("train", *other).stderr


def test_a_copy_is_smoothed_on_request_or_as_a_last_resort(run: Run, run_dir: Path) -> None:
    as_it_was = load_file(run_dir / "checkpoint-4" / "model.safetensors")
    for words, is_smoothed in (((), False), (("--failed-at", "3"), True)):
        out = run_dir.with_name(f"copy-{is_smoothed}")
        shown = " ".join(run("rescue", run_dir, "--write", out, *words).stdout.split())
        assert f"Written:{out}" in shown.replace(" ", "")  # a long path is wrapped
        assert ("matrices" in shown) == is_smoothed
        copied = load_file(out / "model.safetensors")
        same = all(torch.equal(copied[name], one) for name, one in as_it_was.items())
        assert same != is_smoothed
        assert "--pss_preset floor" in shown  # the run that goes on is guarded
    asked = run("rescue", run_dir, "--write", run_dir.with_name("asked"), "--smoothing", "floor")
    assert "Sound weights also lie below that" in " ".join(asked.stdout.split())


def test_a_file_that_cannot_be_copied_is_named(run: Run, run_dir: Path) -> None:
    """The message must not blame the target for a folder in the place of a source file."""
    path = run_dir / "checkpoint-4" / "generation_config.json"
    path.unlink()
    path.write_bytes(b"{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_pss.rescue.repair.shutil.copyfile", _unreadable)
        result = run("rescue", run_dir, "--write", run_dir.with_name("out"))
    assert result.exit_code == 2
    assert "could not be copied" in result.stderr
    assert f"Input/output error ({path.parent}" in " ".join(result.stderr.split())


def _unreadable(source: Path, target: Path) -> None:
    raise OSError(errno.EIO, "Input/output error", source)


def test_nothing_is_written_elsewhere(run: Run, run_dir: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run("rescue", run_dir)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "words",
    [
        ("--moments", "reset"),
        ("--lr-scale", "0"),
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


def test_help_shows_options_and_examples(run: Run) -> None:
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
