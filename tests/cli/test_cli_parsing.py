from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from hf_pss.cli import train_command as help_page
from hf_pss.cli.parsing import make_parser, parse_plan
from hf_pss.cli.progress import set_step_counts_
from hf_pss.cli.train_options import FRESH_LEARNING_RATE, LEARNING_RATE_HELP, TUNED_LEARNING_RATE
from hf_pss.errors import ConfigurationError
from hf_pss.trainer.arguments import OptimizerName


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_line_wins_over_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "night.yaml",
        "learning_rate: 3e-3\n"  # YAML 1.1 reads this as a string
        "model-config: gpt2\n"
        "model_overrides: {n_layer: 2, resid_pdrop: 0.0}\n"
        "max_steps: 7\n"
        "bf16: false\n"
        "dataloader_drop_last: true\n"
        "lr_scheduler_kwargs: {num_decay_steps: 3}\n"
        "pss_detectors: [grad_norm_ratio, stable_rank_floor]\n"
        "pss_exclude: []\n"
        "tokenizer: null\n",
    )
    plan = parse_plan(["--max_steps", "9", "--config", str(path), "--pss-smoothing=log"])
    assert plan.arguments.learning_rate == 3e-3
    assert plan.arguments.max_steps == 9
    assert plan.arguments.dataloader_drop_last is True
    assert plan.arguments.lr_scheduler_kwargs == {"num_decay_steps": 3}
    assert plan.arguments.output_dir == "runs/night"
    assert plan.arguments.pss_config().detectors == ("grad_norm_ratio", "stable_rank_floor")
    assert plan.arguments.pss_config().smoothing == "log"
    assert plan.model.model_config == "gpt2"
    assert plan.model.model_overrides == '{"n_layer": 2, "resid_pdrop": 0.0}'
    assert plan.model.tokenizer is None


def test_empty_list_in_yaml_means_no_detector(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "pss_detectors: []\n")
    assert parse_plan(["--config", str(path)]).arguments.pss_config().detectors == ()


def test_a_boolean_option_needs_no_value() -> None:
    assert parse_plan(["--pss_observe_only", "--bf16", "false"]).arguments.pss_observe_only is True
    assert parse_plan(["--pss_observe_only", "false"]).arguments.pss_observe_only is False
    assert parse_plan([]).arguments.pss_observe_only is False


def test_defaults() -> None:
    plan = parse_plan([])
    assert plan.arguments.output_dir == "runs/train"
    assert plan.arguments.report_to == []
    assert plan.data.dataset == "python"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "Did you mean learning_rate"),
        (["--preset=floor"], "no option --preset. Did you mean pss_preset"),
        (["--learn", "1"], "no option --learn"),  # no abbreviations: they break when options come
        (["notes.txt"], "--dataset notes.txt"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--learning_rate"], "expected one argument"),
        (["--pss_preset", "ceiling"], "invalid choice: 'ceiling'"),
        (["--pss_threshold_ratio", "0.5"], "pss_threshold_ratio must be"),
        (["--pss_detectors", "grad_norm"], "pss_detectors may be grad_norm_ratio or"),
        (["--load_best_model_at_end", "--save_steps", "7"], "load_best_model_at_end"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read: No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_plan(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "sets 'learning_rat', which is not an option. Did you mean learni"),
        ("threshold_ratio: 3", "Did you mean pss_threshold_ratio"),
        ("learning_rate: [1", "not valid YAML"),
        ("- learning_rate", "must hold options, one a line"),
        ("config: other.yaml", "sets 'config'"),
        ("learning-rate: fast", "run.yaml sets learning-rate: fast. invalid float value"),
        ("pss_preset: flor", "run.yaml sets pss_preset: flor. invalid choice"),
        ("learning_rate: [1, 2]", "learning_rate takes one value"),
        ("pss_max_rank: 0", "pss_max_rank must be a whole number of at least 1"),
    ],
)
def test_a_mistake_in_a_yaml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigurationError) as caught:
        parse_plan(["--config", str(path)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["--model_config", "gpt2"], FRESH_LEARNING_RATE),
        (["--model", "gpt2"], TUNED_LEARNING_RATE),
        (["--model=gpt2", "--learning_rate", "3"], 3.0),
    ],
)
def test_the_default_learning_rate_depends_on_the_model(words: list[str], rate: float) -> None:
    assert parse_plan(words).arguments.learning_rate == rate
    for shown in ("1e-3 for fresh weights", "2e-5 with --model"):
        assert shown in LEARNING_RATE_HELP
    assert (FRESH_LEARNING_RATE, TUNED_LEARNING_RATE) == (1e-3, 2e-5)


def test_help_of_pss_options_names_one_default() -> None:
    text = " ".join(make_parser().format_help().split())
    assert re.search(r"Preset anchored: 2\.5\. --pss", text)
    assert LEARNING_RATE_HELP in text
    assert re.search(r"paper \(as published, for random weights\)\. \(default: anchored\)", text)


@pytest.mark.parametrize(
    ("words", "num_steps"),
    [
        (["--max_steps", "40"], 40),
        (["--num_train_epochs", "1.5", "--gradient_accumulation_steps", "2"], 11),
        (["--per_device_train_batch_size", "9", "--dataloader_drop_last"], 33),
    ],
)
def test_shares_of_all_steps_become_numbers_of_steps(words: list[str], num_steps: int) -> None:
    arguments = parse_plan(["--use_cpu", *words, "--save_steps", "7"]).arguments
    set_step_counts_(arguments, num_blocks=101)
    assert arguments.save_steps == 7
    assert arguments.eval_steps == math.ceil(num_steps / 10)
    assert arguments.logging_steps == 1


def test_help_page_names_options_that_exist() -> None:
    known = {f.name for dtype in make_parser().dataclass_types for f in fields(dtype)}
    shown = {name for names, _ in help_page._TRAINING for name in names.split(", ")}
    shown |= {f"pss_{name}" for name in help_page._PSS}
    shown |= {name for name, _ in help_page._OPTIMIZER}
    assert shown <= known


def test_help_page_names_every_optimizer() -> None:
    text = dict(help_page._OPTIMIZER)["pss_optim"]
    assert all(re.search(rf"\b{name}\b", text) for name in get_args(OptimizerName))


def test_a_run_reports_to_several_trackers(tmp_path: Path) -> None:
    words = ["--model_config", "gpt2", "--max_steps", "1", "--report_to", "tensorboard", "trackio"]
    assert parse_plan(words).arguments.report_to == ["tensorboard", "trackio"]
    path = write(tmp_path / "both.yaml", "report_to: [tensorboard, trackio]\nmodel_config: gpt2\n")
    assert parse_plan(["--config", str(path)]).arguments.report_to == ["tensorboard", "trackio"]
    assert parse_plan([*words[:-2], "none"]).arguments.report_to == []
