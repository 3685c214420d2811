"""The quick starts of axolotl, LLaMA-Factory and ms-swift with their real command lines.

Each has an environment of its own, in which `make test-frameworks` runs these tests.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from framework_pages import (
    OPTIONS,
    as_words,
    make_model_and_rows,
    needs_framework,
    run,
    snippets_of,
)
from helpers import events_of
from safetensors.torch import load_file

NUM_STEPS = 6
PSS_WORDS = as_words(dict(OPTIONS))
CONFIGURATION = ", ".join(f"{k.removeprefix('pss_')}={v}" for k, v in OPTIONS.items())


def axolotl_file(folder: Path, **options: object) -> str:
    settings = {
        "base_model": "./model",
        "datasets": [{"path": "./rows.jsonl", "ds_type": "json", "type": "alpaca"}],
        "output_dir": "./out",
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
        "seed": 1,
        "lr_scheduler": "constant",
        "special_tokens": {"pad_token": "<|endoftext|>"},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump({**settings, **options}), "utf-8")
    return "train.yaml"


def axolotl_itself(folder: Path) -> None:
    plugin = "hf_pss.integrations.axolotl.PSSPlugin"
    file = axolotl_file(folder, plugins=[plugin], **OPTIONS)
    run(folder, "-m", "axolotl.cli.train", file, AXOLOTL_DO_NOT_TRACK="1")


def axolotl_executed(folder: Path, **options: object) -> None:
    words = ("-m", "axolotl.cli.train", axolotl_file(folder, **options))
    executed(folder, *words, AXOLOTL_DO_NOT_TRACK="1")


FACTORY = {
    "model_name_or_path": "./model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "rows",
    "dataset_dir": ".",
    "template": "alpaca",
    "cutoff_len": 64,
    "output_dir": "out",
    "max_steps": NUM_STEPS,
    "learning_rate": 1e-2,
    "report_to": "none",
}


def factory_itself(folder: Path) -> None:
    [snippet] = snippets_of("llama_factory")
    snippet = snippet.replace('"./model"', f'"./model", **{FACTORY}')
    pss = f"PSSCallback(__import__('hf_pss').PSSConfig.preset({CONFIGURATION}))"
    (folder / "info.py").write_text(snippet.replace("PSSCallback()", pss), "utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    run(folder, "info.py")


def factory_executed(folder: Path, **options: object) -> None:
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (folder / "train.yaml").write_text(yaml.safe_dump({**FACTORY, **options}), "utf-8")
    executed(folder, "-m", "llamafactory.cli", "train", "train.yaml")


SWIFT = ("-m", "swift.cli.main", "sft", "--model", "./model", "--model_type", "llama")
SWIFT += ("--template", "dummy", "--tuner_type", "full", "--dataset", "chats.jsonl")
SWIFT += ("--max_steps", str(NUM_STEPS), "--learning_rate", "1e-2", "--torch_dtype", "float32")
SWIFT += ("--max_length", "64", "--output_dir", "out", "--add_version", "false")


def swift_itself(folder: Path) -> None:
    [snippet] = snippets_of("ms_swift")
    (folder / "pss_plugin.py").write_text(
        snippet.replace('"anchored"', f'"anchored", {CONFIGURATION}'), "utf-8"
    )
    run(folder, *SWIFT, "--external_plugins", "pss_plugin.py", "--callbacks", "pss")


def swift_executed(folder: Path, **options: object) -> None:
    executed(folder, *SWIFT, *(word for k, v in options.items() for word in (f"--{k}", str(v))))


def executed(folder: Path, *words: str, **variables: str) -> None:
    said = run(
        folder, "-m", "hf_pss.cli", "exec", *PSS_WORDS, "--", sys.executable, *words, **variables
    )
    assert "PSS watched 1 Trainer(s)" in said


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    return load_file(folder / "out" / f"checkpoint-{NUM_STEPS}" / "model.safetensors")


Start = Callable[..., None]

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("package", "itself", "with_exec"),
    [
        ("axolotl", axolotl_itself, axolotl_executed),
        ("llamafactory", factory_itself, factory_executed),
        ("swift", swift_itself, swift_executed),
    ],
)
def test_a_quick_start_intervenes_and_equals_exec(
    package: str, itself: Start, with_exec: Start, tmp_path: Path
) -> None:
    needs_framework(package)
    weights, steps = [], []
    for name, start in (("itself", itself), ("with_exec", with_exec)):
        folder = tmp_path / name
        folder.mkdir()
        make_model_and_rows(folder)
        start(folder)
        steps.append([event["step"] for event in events_of(folder / "out")])
        [file] = sorted((folder / "out").rglob("model.safetensors"))[-1:]
        weights.append(load_file(file))
    assert steps[0]
    assert steps[0] == steps[1]
    assert [k for k, v in weights[0].items() if not v.equal(weights[1][k])] == []


@pytest.mark.parametrize(
    ("package", "start"),
    [
        ("axolotl", axolotl_executed),
        ("llamafactory", factory_executed),
        ("swift", swift_executed),
    ],
)
def test_a_resumed_run_ends_like_a_whole_one(package: str, start: Start, tmp_path: Path) -> None:
    needs_framework(package)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    make_model_and_rows(whole)
    half = NUM_STEPS // 2
    start(whole, save_steps=half)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "out" / f"checkpoint-{NUM_STEPS}")
    start(resumed, save_steps=half, resume_from_checkpoint=f"out/checkpoint-{half}")
    expected, found = weights_in(whole), weights_in(resumed)
    assert [name for name, value in expected.items() if not value.equal(found[name])] == []
    steps = [event["step"] for event in events_of(whole / "out")]
    assert steps
    assert [event["step"] for event in events_of(resumed / "out")] == steps
