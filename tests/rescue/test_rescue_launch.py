"""The options that `hf-pss train` keeps give the same arguments again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from hf_pss.cli.loading import read_overrides
from hf_pss.cli.parsing import TrainPlan, parse_plan
from hf_pss.cli.resume import options_to_keep
from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.runs.folder import EVENTS_FILE, OPTIONS_FILE
from hf_pss.runs.options import TRAINING_OPTIONS, num_processes, read_launch
from hf_pss.runs.records_files import RunLog, RunRecords, read_run_records

FRESH = ("--model_config", "gpt2", "--use_cpu")
LOG = RunLog(Path("trainer_state.json"), 5, 10, 8, ())
OVERRIDES = '{"n_layer": 2, "a": null, "b": [1, 2], "c": {"d": "1", "e": 0.5}, "f": "2"}'


def kept(folder: Path, *words: str) -> tuple[TrainPlan, Path]:
    """The plan of these words, and a checkpoint beside the file that a run of it writes."""
    plan = parse_plan([*FRESH, *words, "--output_dir", str(folder)])
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    write(checkpoint.parent, options_to_keep(plan, None, warn=print))
    return plan, checkpoint


def write(folder: Path, options: Any) -> None:
    (folder / OPTIONS_FILE).write_text(json.dumps({"version": 1, **options}))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--pss_optim", "muon", "--pss_optim_args", "momentum=0.9,others_lr=1e-3"),
        ("--pss_optim", "muon", "--pss_optim_args", '{"momentum": 0.9}'),
        ("--optim", "adafactor", "--optim_args", "scale_parameter=False"),
        ("--label_smoothing_factor", "0.1", "--eval_strategy", "no", "--save_strategy", "epoch"),
        ("--per_device_train_batch_size", "3", "--auto_find_batch_size"),
        ("--pss_preset", "anchored", "--pss_roles", "mlp", "--pss_exclude", "h.0", "h.1"),
        ("--gradient_checkpointing", "true"),
        ("--metric_for_best_model", "eval_runtime", "--greater_is_better", "false"),
        ("--pss_lr_scale", "0.25", "--learning_rate", "1e-3"),
        ("--pss_detectors", "--pss_on_nonfinite", "stop", "--pss_max_interventions", "4"),
        ("--pss_on_failure", "rollback", "--pss_keep_frobenius", "--pss_health", "light"),
        ("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}'),
        ("--model_overrides", OVERRIDES),
    ],
)
def test_a_launch_comes_back(tmp_path: Path, words: tuple[str, ...]) -> None:
    plan, checkpoint = kept(tmp_path / "run", *words)
    launch = read_launch(checkpoint, LOG, without=())
    assert launch is not None
    assert launch.is_whole
    again = parse_plan(launch.words)
    for name in TRAINING_OPTIONS:
        assert getattr(again.arguments, name) == getattr(plan.arguments, name), name
    overrides = [read_overrides(one.model.model_overrides or "") for one in (plan, again)]
    assert overrides[0] == overrides[1]
    same = [replace(one.model, model_overrides=None) for one in (plan, again)]
    assert same[0] == same[1]
    assert again.data == plan.data
    has_newer_name = hasattr(plan.arguments, "activation_checkpointing")
    assert not (has_newer_name and "--gradient_checkpointing" in launch.words)
    assert again.arguments.max_steps == 10


def test_a_run_that_was_resumed_scaled_has_that_on_record(tmp_path: Path) -> None:
    """A run that resumes from there without the option inherits the factor."""
    _, first = kept(tmp_path / "first", "--learning_rate", "1e-2", "--seed", "3")
    checkpoint, words = first, ("--learning_rate", "1e-3", "--pss_lr_scale", "0.25")
    for name, more in (("second", words), ("third", ("--learning_rate", "0.5"))):
        plan = parse_plan([*FRESH, *more, "--output_dir", str(tmp_path / name)])
        options = options_to_keep(plan, checkpoint, warn=lambda text: None)
        assert options is not None
        (checkpoint := tmp_path / name / "checkpoint-5").mkdir(parents=True)
        write(checkpoint.parent, options)
        launch = read_launch(checkpoint, LOG, without=())
        assert launch is not None
        assert launch.lr_scale == 0.25
        given = dict(zip(launch.words[::2], launch.words[1::2], strict=True))
        assert (given["--learning_rate"], given["--seed"]) == ("0.001", "3")


def test_a_warning_names_the_inherited_lr_scale(tmp_path: Path) -> None:
    _, checkpoint = kept(tmp_path / "run", "--learning_rate", "1e-2", "--pss_lr_scale", "0.25")
    again = parse_plan([*FRESH, "--learning_rate", "1e-2", "--output_dir", str(tmp_path / "on")])
    said: list[str] = []
    options_to_keep(again, checkpoint, warn=said.append)
    (line,) = said
    assert "continues with 0.25 times --learning_rate 0.01" in line


@pytest.mark.parametrize("bad", [None, [], 1, "x"])
def test_damaged_options_are_an_error_that_names_the_file(tmp_path: Path, bad: Any) -> None:
    plan, checkpoint = kept(tmp_path / "run")
    file = checkpoint.parent / OPTIONS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"training": bad}))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        options_to_keep(plan, checkpoint, warn=print)


def test_every_option_of_pss_is_kept() -> None:
    assert {f"pss_{option.name}" for option in fields(PSSConfig)} < set(TRAINING_OPTIONS)


def test_local_files_are_named_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "llama.json", "gpt2", "python"):
        Path(name).write_text("{}")
    plan, checkpoint = kept(tmp_path / "run", "--dataset", "notes.txt", "--tokenizer", "org/name")
    launch = read_launch(checkpoint, LOG, without=())
    assert launch is not None
    given = dict(zip(launch.words[::2], launch.words[1::2], strict=True))
    assert given["--dataset"] == str(tmp_path / "notes.txt")
    assert given["--tokenizer"] == "org/name"
    assert given["--model_config"] == "gpt2"  # a kind, and no file
    assert options_to_keep(plan, None, warn=print)["paths"].keys() == {"dataset"}
    # The file of a binding option by another name is still the same one.
    _, other = kept(tmp_path / "other", "--model_config", "llama.json", "--dataset", "python")
    resumed = parse_plan(["--model_config", str(tmp_path / "llama.json"), "--use_cpu"])
    said: list[str] = []
    again = options_to_keep(resumed, other, warn=said.append)
    assert again is not None
    assert again["model_config"] == "llama.json"
    assert said == []


def test_a_file_of_before_has_the_batch_size_in_the_log(tmp_path: Path) -> None:
    plan, checkpoint = kept(tmp_path / "run", "--per_device_train_batch_size", "3")
    options = {**asdict(plan.model), **asdict(plan.data), "learning_rate": 1e-3, "training": {}}
    write(checkpoint.parent, {**options, "model_overrides": {}})
    launch = read_launch(checkpoint, LOG, without=())
    assert launch is not None
    assert not launch.is_whole
    assert parse_plan(launch.words).arguments.per_device_train_batch_size == 8


@pytest.mark.parametrize(
    "bad",
    [
        {"training": 1},
        {"paths": ["a"]},
        {"paths": {"dataset": 1.5, "model": ["a"]}},
        {"training": {"pss_roles": [1]}},
        {"training": {"pss_roles": ["--report_to=all"]}},
        {"training": {"seed": ["1"]}},
        {"training": {"optim_args": "\u202e"}},
    ],
)
def test_options_of_a_wrong_type_are_not_used(tmp_path: Path, bad: dict[str, Any]) -> None:
    plan, checkpoint = kept(tmp_path / "run")
    write(checkpoint.parent, {**(options_to_keep(plan, None, warn=print) or {}), **bad})
    assert read_launch(checkpoint, LOG, without=()) is None


def test_no_word_commands_a_terminal(tmp_path: Path) -> None:
    evil = {"\x1b[2J": ["\u202e", None, 10**400, 1e308]}
    _, checkpoint = kept(tmp_path / "run", "--model_overrides", json.dumps(evil))
    launch = read_launch(checkpoint, LOG, without=())
    assert launch is not None
    assert all(word.isprintable() for word in launch.words)
    assert read_overrides(launch.words[launch.words.index("--model_overrides") + 1]) == evil


def test_a_copy_has_its_own(tmp_path: Path) -> None:
    _, checkpoint = kept(tmp_path / "run", "--seed", "1")
    _, inner = kept(tmp_path / "other", "--seed", "2")
    (inner.parent / OPTIONS_FILE).rename(checkpoint / OPTIONS_FILE)
    launch = read_launch(checkpoint, LOG, without=())
    assert launch is not None
    assert launch.words[launch.words.index("--seed") + 1] == "2"


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    _, checkpoint = kept(tmp_path / "run")
    (checkpoint.parent / OPTIONS_FILE).rename(tmp_path / "elsewhere.json")
    (checkpoint.parent / OPTIONS_FILE).symlink_to(tmp_path / "elsewhere.json")
    (checkpoint.parent / EVENTS_FILE).symlink_to(tmp_path / "elsewhere.json")
    assert read_launch(checkpoint, LOG, without=()) is None
    assert read_run_records(checkpoint.parent) == RunRecords()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), 1),
        (("rng_state.pth",), 1),
        (("rng_state_0.pth", "rng_state_1.pth", "rng_state_x.pth"), 2),
        (("rng_state_1.pth", "rng_state_2.pth"), None),
    ],
)
def test_processes_are_counted_by_their_random_states(
    tmp_path: Path, names: tuple[str, ...], expected: int | None
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert num_processes(tmp_path) == expected
