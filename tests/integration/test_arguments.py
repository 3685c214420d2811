"""PSSTrainingArguments: from Python, the command line and YAML."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_pss import PRESETS, ConfigurationError, PSSConfig, PSSTrainingArguments

OPTIONS = {
    "pss_preset": "anchored",
    "pss_detectors": ["grad_norm_ratio", "stable_rank_drop"],
    "pss_threshold_ratio": 3.5,
    "pss_calibration_steps": 7,
    "pss_smoothing": "log",
    "pss_observe_only": True,
    "pss_keep_frobenius": False,
    "pss_max_interventions": 5,
    "pss_include": [r"h\.0\..*"],
    "pss_roles": ["mlp"],
}
WANTED = PSSConfig.preset(
    "anchored",
    detectors=("grad_norm_ratio", "stable_rank_drop"),
    threshold_ratio=3.5,
    calibration_steps=7,
    smoothing="log",
    observe_only=True,
    max_interventions=5,
    include=(r"h\.0\..*",),
    roles=("mlp",),
)


def as_command_line(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def parse(*words: str) -> PSSTrainingArguments:
    (parsed,) = HfArgumentParser(PSSTrainingArguments).parse_args_into_dataclasses(list(words))
    return parsed


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def test_every_option_has_its_argument() -> None:
    names = {spec.name for spec in dataclasses.fields(PSSTrainingArguments)}
    own = {name for name in names if name.startswith("pss_")}
    options = {f"pss_{spec.name}" for spec in dataclasses.fields(PSSConfig)}
    assert own == options | {"pss_preset", "pss_optim", "pss_optim_args", "pss_lr_scale"}
    assert get_args(get_type_hints(PSSTrainingArguments)["pss_preset"]) == tuple(PRESETS)


def test_no_preset_sets_a_flag() -> None:
    """A flag's argument always overrides the preset: it cannot tell False from not given."""
    flags = {name for name, hint in get_type_hints(PSSConfig).items() if hint is bool}
    assert flags == {"keep_frobenius", "observe_only", "smooth_on_resume"}
    assert not any(flags & set(preset) for preset in PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_not_given_is_the_presets(preset: str, folder: str) -> None:
    arguments = PSSTrainingArguments(folder, pss_preset=preset, use_cpu=True)
    assert arguments.pss_config() == PSSConfig.preset(preset)
    assert arguments.output_dir == folder  # TrainingArguments' fields keep their order


def test_from_python(folder: str) -> None:
    assert PSSTrainingArguments(folder, **OPTIONS).pss_config() == WANTED


def test_from_the_command_line(folder: str) -> None:
    parsed = parse("--output_dir", folder, "--learning_rate", "0.1", *as_command_line(OPTIONS))
    assert (parsed.pss_config(), parsed.learning_rate) == (WANTED, 0.1)


def test_flags_need_no_value(folder: str) -> None:
    assert parse("--output_dir", folder, "--pss_observe_only").pss_config().observe_only
    assert not parse("--output_dir", folder).pss_config().observe_only


def test_from_yaml(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": folder, **OPTIONS, "pss_exclude": None}))
    (parsed,) = HfArgumentParser(PSSTrainingArguments).parse_yaml_file(str(path))
    assert parsed.pss_config() == WANTED


def test_help_prints_and_explains(folder: str) -> None:
    text = HfArgumentParser(PSSTrainingArguments).format_help()
    assert "--pss_threshold_ratio" in text
    assert "2.5 in the" in text
    words = {spec.name for spec in dataclasses.fields(PSSConfig)}
    assert all(f"--pss_{word}" in text for word in words)


@pytest.mark.parametrize(
    "options",
    [
        {"pss_threshold_ratio": 0.5},
        {"pss_smoothing": "blur"},
        {"pss_detectors": ["no_such"]},
        {"pss_preset": "papers"},
        {"pss_max_rank": 0},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_at_construction(options: dict[str, Any], folder: str) -> None:
    with pytest.raises(ConfigurationError):
        PSSTrainingArguments(folder, use_cpu=True, **options)


def test_the_command_line_refuses_unknown_words(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--output_dir", folder, "--pss_smoothing", "blur")
    assert "softplus" in capsys.readouterr().err


def test_arguments_survive_pickle_and_json(folder: str) -> None:
    arguments = PSSTrainingArguments(folder, use_cpu=True, **OPTIONS)
    assert pickle.loads(pickle.dumps(arguments)).pss_config() == WANTED
    kept = json.loads(arguments.to_json_string())
    assert {name: kept[name] for name in OPTIONS} == OPTIONS
    copy = dataclasses.replace(arguments, pss_smoothing="clip")
    assert copy.pss_config() == dataclasses.replace(WANTED, smoothing="clip")


def test_plain_arguments_are_not_changed(folder: str) -> None:
    plain = TrainingArguments(folder, use_cpu=True).to_dict()
    own = PSSTrainingArguments(folder, use_cpu=True).to_dict()
    shared = {name: value for name, value in own.items() if not name.startswith("pss_")}
    assert shared == plain


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, hf_pss; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
