"""PSSTrainingArguments: from Python, the command line and YAML."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from helpers import gpt2, make_trainer, token_rows
from peft import LoraConfig, get_peft_model
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, GRPOConfig, SFTConfig, TrlParser

from hf_pss import (
    PRESETS,
    ConfigurationError,
    PSSCallback,
    PSSConfig,
    PSSTrainer,
    PSSTrainingArguments,
    RecoveryConfig,
    config,
)

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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pss_threshold_ratio": 0.5}, "pss_threshold_ratio must be a number above 1; you gave"),
        ({"pss_on_failure": "x"}, "pss_on_failure may be smooth or rollback or stop; you gave 'x'"),
        ({"pss_detectors": ["x"]}, "pss_detectors may be .* or stable_rank_drop or spectral_norm"),
        (
            {"pss_observe_only": True, "pss_smooth_on_resume": True},
            "pss_observe_only changes no weight, and pss_smooth_on_resume",
        ),
    ],
)
def test_errors_spell_options_as_the_user_did(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{words}"):
        PSSTrainingArguments(use_cpu=True, **options)


def as_command_line(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def parse(*words: str) -> PSSTrainingArguments:
    (parsed,) = HfArgumentParser(PSSTrainingArguments).parse_args_into_dataclasses(list(words))
    return parsed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pss_preset": "floor", "pss_smoothing": "log"}, "pss_smoothing has no effect"),
        (
            {"pss_preset": "paper", "pss_trial_margin_ratio": 0.1},
            "pss_trial_margin_ratio has no effect with pss_trial='off'.",
        ),
        ({"pss_preset": "floor", "pss_trial": "spikes"}, "pss_trial='all' has."),
    ],
)
def test_warnings_spell_options_as_the_user_did(
    options: dict[str, Any], words: str, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    config._warn_once.cache_clear()
    PSSTrainingArguments(folder, use_cpu=True, **options)
    assert words in caplog.text
    caplog.clear()
    given = {name.removeprefix("pss_"): value for name, value in options.items()}
    PSSConfig.preset(given.pop("preset"), **given)
    assert "has no effect" in caplog.text
    assert "pss_" not in caplog.text


def test_warnings_of_a_run_spell_options_as_the_user_did(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    once = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "report_to": "none"}

    def train(trainer_options: dict[str, Any], **options: Any) -> str:
        caplog.clear()
        adapter = LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
        PSSTrainer(
            model=get_peft_model(gpt2(), adapter),
            args=PSSTrainingArguments(folder, **once, **options),
            train_dataset=token_rows(8),
            **trainer_options,
        ).train()
        return caplog.text

    said = train({}, pss_moments="reset", pss_on_failure="rollback")
    assert "pss_moments='reset': the first moments" in said
    assert "pss_on_failure='rollback' has no effect" in said
    recovery = RecoveryConfig(on_failure="rollback")
    said = train({"pss_config": PSSConfig(moments="reset"), "recovery": recovery})
    assert " moments='reset': the first moments" in said
    assert " on_failure='rollback' has no effect" in said


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def test_every_option_has_its_argument() -> None:
    names = {spec.name for spec in dataclasses.fields(PSSTrainingArguments)}
    own = {name for name in names if name.startswith("pss_")}
    groups = (PSSConfig, RecoveryConfig)
    options = {f"pss_{spec.name}" for group in groups for spec in dataclasses.fields(group)}
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


# ---- combined with another arguments class ----

OTHERS = (SFTConfig, GRPOConfig, DPOConfig, Seq2SeqTrainingArguments)


@dataclasses.dataclass
class Mine(PSSTrainingArguments, SFTConfig):
    """What a user writes."""

    logging_steps: float = 77
    things: list[str] = dataclasses.field(default_factory=list)


class Plain(SFTConfig, PSSTrainingArguments):
    """Without the decorator, and the other way round."""


def combined(other: type[Any], *, is_first: bool, is_decorated: bool) -> Any:
    bases = (PSSTrainingArguments, other) if is_first else (other, PSSTrainingArguments)
    made = type("Made", bases, {"__module__": __name__})
    return dataclasses.dataclass(made) if is_decorated else made


def on_cpu(cls: type[Any]) -> dict[str, Any]:
    is_trls = any(base.__module__.startswith("trl") for base in cls.__mro__)
    return {"use_cpu": True, "save_strategy": "no", **({"bf16": False} if is_trls else {})}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("other", "is_first", "is_decorated"),
    [*itertools.product(OTHERS, (True, False), (True, False))],
)
def test_a_combined_class_keeps_the_other_ones_defaults(
    other: type[Any], is_first: bool, is_decorated: bool, folder: str
) -> None:
    made = combined(other, is_first=is_first, is_decorated=is_decorated)
    names = {spec.name for spec in dataclasses.fields(made)}
    own = {spec.name for spec in dataclasses.fields(PSSTrainingArguments)}
    assert names == own | {spec.name for spec in dataclasses.fields(other)}
    options = on_cpu(other)
    wanted = other(folder, **options)
    words = ["--output_dir", folder, "--pss_preset", "floor"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    found = [made(folder, pss_preset="floor", **options)]
    for parser in (HfArgumentParser, TrlParser):
        found += parser(made).parse_args_into_dataclasses(words)
    for arguments in found:
        assert arguments.pss_config() == PSSConfig.preset("floor")
        for spec in dataclasses.fields(other):
            assert getattr(arguments, spec.name) == getattr(wanted, spec.name), spec.name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_fields_of_ones_own_win_and_copies_survive(folder: str) -> None:
    mine = Mine(folder, bf16=False, use_cpu=True, things=["a"])
    assert (mine.logging_steps, mine.gradient_checkpointing, mine.things) == (77, True, ["a"])
    assert Mine(folder, bf16=False, use_cpu=True).things == []
    for arguments in (mine, Plain(folder, bf16=False, use_cpu=True, pss_floor_ratio=0.5)):
        copied = pickle.loads(pickle.dumps(arguments))
        assert copied == arguments
        assert isinstance(copied, SFTConfig)
    assert Plain(folder, bf16=False, use_cpu=True).logging_steps == 10  # trl's


# ---- under a Trainer without PSS ----


def plain_run(folder: str, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    arguments = PSSTrainingArguments(
        folder, max_steps=1, use_cpu=True, save_strategy="no", report_to="none", **options
    )
    caplog.clear()
    trainer = Trainer(gpt2(), arguments, train_dataset=token_rows(8))
    trainer.train()
    trainer.train()
    return [r.message for r in caplog.records if r.name.startswith("hf_pss")]


def test_options_under_a_plain_trainer_are_one_warning(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = plain_run(folder, caplog, pss_optim="muon", pss_preset="floor")
    assert line.startswith("pss_preset='floor', pss_optim='muon': without effect")
    assert "Use PSSTrainer" in line
    assert plain_run(folder, caplog) == []


@pytest.mark.parametrize("is_attached", [True, False])
def test_where_pss_is_at_work_nothing_is_said_of_a_plain_trainer(
    is_attached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cls = Trainer if is_attached else PSSTrainer
    own = {"pss_floor_ratio": 0.9} if is_attached else {"pss_optim": "muon"}
    options = {**own, "max_steps": 1, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, trainer_class=cls, **options)
    if is_attached:
        PSSCallback().attach(trainer)
    trainer.train()
    assert "without effect" not in caplog.text
    assert "PSS: preset" in caplog.text
    assert "pss_is_heard" not in trainer.args.to_dict()
    assert "pss_is_heard" not in {spec.name for spec in dataclasses.fields(trainer.args)}
