"""Pretraining: `hf-pss train` with the options for large runs, and the script of the recipes."""

from __future__ import annotations

import ast
import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from preloaded import as_python, start
from scripts import RECIPES, load_script
from small_library import use_small_library
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

import hf_pss
from hf_pss.cli.app import app
from hf_pss.cli.loading import SIZES, load_tokenizer, load_training_text, make_config, make_model
from hf_pss.cli.parsing import micro_batches, parse_plan
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import train_tokenizer

script = load_script("pretrain_gpt2")

ROOT = RECIPES.parent
RECIPE_FILES = sorted(RECIPES.glob("gpt2_*/*.yaml"))
TINY = RECIPES / "gpt2_tiny_cpu" / "pss.yaml"
BIG = RECIPES / "gpt2_124m"
FIVE_STEPS = (
    *("--config", str(TINY), "--max_steps", "5", "--warmup_steps", "1", "--save_steps", "5"),
    *("--lr_scheduler_kwargs", '{"num_decay_steps": 2}', "--max_tokens", "100000"),
    *("--max_validation_blocks", "8", "--eval_steps", "5", "--use_cpu", "--disable_tqdm"),
)
SMALL = (
    *("--model_config", "gpt2", "--model_overrides", "n_layer=2,n_embd=32,n_head=2,n_positions=32"),
    *("--context_length", "32", "--per_device_train_batch_size", "4", "--use_cpu"),
    *("--max_validation_blocks", "4", "--vocab_size", "300", "--disable_tqdm"),
)
NUM_DOCUMENTS = 400
Train = Callable[..., Result]


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use_small_library(monkeypatch)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def train() -> Train:
    """Run `hf-pss train` with these words in this process."""

    def run(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["train", *words])
        assert result.exit_code == code, result.stderr
        return result

    return run


@pytest.fixture
def rows(tmp_path: Path) -> tuple[str, ...]:
    """Options that read rows of two files, with a tokenizer from a folder."""
    texts = [f"document {i}: the quick brown fox jumps over it." for i in range(NUM_DOCUMENTS)]
    for part in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::2]]
        (tmp_path / f"part{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(texts, vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    own = ("--dataset", str(tmp_path / "part*.jsonl"), "--logging_steps", "1")
    return (*own, "--tokenizer", str(tmp_path / "tokenizer"))


@pytest.fixture
def stream(rows: tuple[str, ...]) -> tuple[str, ...]:
    """Options that train a small model on a stream of these rows."""
    return (*SMALL, *rows, "--streaming")


def history(folder: str) -> list[dict[str, Any]]:
    state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    return state["log_history"]


def losses(folder: str) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


# ---- the files ----


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses(path: Path) -> None:
    plan = parse_plan(["--config", str(path)])
    assert bool(plan.scale.model_size) != bool(plan.model.model_config)
    assert plan.data.context_length > 1
    assert plan.arguments.max_steps > 0
    assert path.parent.name in plan.arguments.output_dir


def test_there_is_a_twin_at_every_rate() -> None:
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in BIG.glob("*.yaml")}
    for suffix, factor in (("", 1), ("_lr3x", 3), ("_lr5x", 5)):
        plain, pss = recipes.pop(f"plain{suffix}"), recipes.pop(f"pss{suffix}")
        assert float(pss["learning_rate"]) == pytest.approx(6e-4 * factor)
        differing = {key for key in plain if plain[key] != pss.get(key)}
        assert plain.keys() - pss.keys() == {"pss_observe_only"}
        assert differing == {"pss_observe_only", "output_dir"}
    assert recipes == {}


@pytest.mark.parametrize(
    ("size", "num_params"),
    [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1.5b", 1_557_611_200)],
)
def test_sizes_are_gpt2s(size: str, num_params: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**SIZES[size]))
    assert model.num_parameters() == num_params
    assert dict(zip(SIZES[size], script.SIZES[size], strict=True)) == SIZES[size]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_imports_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_pss.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_pss"):
            assert node.module == "hf_pss"
            assert {alias.name for alias in node.names} <= set(hf_pss.__all__)


# ---- options ----


@pytest.mark.parametrize(("world_size", "count"), [(1, 40), (8, 5), (20, 2)])
def test_tokens_a_step_do_not_depend_on_the_number_of_devices(
    world_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((BIG / "pss.yaml").read_text(encoding="utf-8"))
    names = ("tokens_per_step", "context_length", "per_device_train_batch_size")
    given = {name: recipe[name] for name in names}
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    known = Namespace(**given, gradient_accumulation_steps=1, use_cpu=True)
    assert micro_batches(known) == count
    monkeypatch.setattr(hf_pss.PSSTrainingArguments, "__post_init__", lambda self: None)
    arguments = script.PretrainArguments(**given, output_dir="out")
    assert arguments.gradient_accumulation_steps == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens_per_step", "100"), "100 is not a multiple of 2048"),
        (("--tokens_per_step", "4096", "--gradient_accumulation_steps", "2"), "one of the two"),
        (("--tokens_per_step", "0"), "at least 1"),
        (("--shufle_buffer", "3"), "Did you mean shuffle_buffer"),
        (("--model_size", "3b"), "model_size"),
    ],
)
def test_a_mistaken_option_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_plan(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model_size", "124m", "--model_config", "gpt2"), "--model_config and --model_size"),
        ((*SMALL, "--streaming", "--tokenizer", "nowhere"), "no tokenizer of that name"),
    ],
)
def test_a_run_that_cannot_begin_names_the_reason(
    train: Train, words: tuple[str, ...], message: str
) -> None:
    more = () if "--streaming" in words else ("--max_tokens", "20000", "--vocab_size", "300")
    assert message in train(*words, *more, "--use_cpu", code=2).stderr


def test_a_stream_needs_an_end(train: Train, stream: tuple[str, ...]) -> None:
    assert "--max_steps" in train(*stream, code=2).stderr
    refused = train(*stream, "--max_steps", "1", "--max_tokens", "9", code=2)
    assert "--max_tokens has no effect" in refused.stderr
    refused = train(*stream, "--max_steps", "1", "--dataset", "python", code=2)
    assert "--streaming reads files" in refused.stderr


# ---- runs of hf-pss train ----


def test_plain_transformers_loads_the_tiny_recipes_run(train: Train) -> None:
    result = train(*FIVE_STEPS, "--logging_steps", "1", "--output_dir", "out")
    assert "1,024 tokens a step: 1 × 16 sequences of 64, on 1 process" in result.stderr
    for folder in ("out", "out/checkpoint-5"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) == 2048
    found = history("out")
    assert sum("throughput/tokens_per_second" in row for row in found) == 5
    assert sum("eval_perplexity" in row for row in found) == 1
    assert [row["step"] for row in found if "pss/grad_norm_preclip" in row] == [1, 2, 3, 4, 5]


def test_a_vocabulary_is_rounded_up(stream: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    config = make_config("gpt2", "n_layer=1,n_embd=8,n_head=2")
    assert make_model(config, tokenizer, vocab_multiple=64).config.vocab_size == 320
    assert make_model(config, tokenizer).config.vocab_size == len(tokenizer) == 300


def test_a_stream_resumes_as_if_never_interrupted(train: Train, stream: tuple[str, ...]) -> None:
    words = [*stream, "--lr_scheduler_type", "constant", "--save_steps", "3", "--max_steps"]
    train(*words, "6", "--output_dir", "whole")
    train(*words, "3", "--output_dir", "parts")
    resume = ("--output_dir", "parts", "--resume_from_checkpoint")
    train(*words, "6", *resume, "true")
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 6
    train(*words, "3", *resume, "false", "--overwrite")  # false is not the name of a folder
    assert losses("parts") == losses("whole")[:3]


# torch's own tracer looks at the gradient of the logits, which is not a leaf (2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_has_the_same_losses_and_health(
    train: Train, stream: tuple[str, ...]
) -> None:
    words = [*stream, "--max_steps", "2", "--pss_health_every_steps", "1"]
    train(*words, "--output_dir", "plain")
    train(*words, "--torch_compile_backend", "eager", "--output_dir", "compiled")
    assert losses("compiled") == losses("plain")
    health = [Path(folder, "pss_health.jsonl").read_text() for folder in ("compiled", "plain")]
    assert health[0] == health[1] != ""
    assert AutoModelForCausalLM.from_pretrained("compiled").num_parameters() > 0


def test_two_ranks_read_one_stream_and_no_block_twice(
    stream: tuple[str, ...], tmp_path: Path
) -> None:
    worker = str(Path(__file__).parent / "pretrain_worker.py")
    # Two ranks take 4 sequences of 32 tokens at once: 512 are two micro-batches each.
    words = [*stream, "--max_steps", "3", "--tokens_per_step", "512", "--shuffle_buffer", "1"]
    _, errors = launch(worker, str(tmp_path), *words)
    assert errors.count("512 tokens a step: 2 × 4 sequences of 32, on 2 processes") == 1
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    blocks = [tuple(block) for rank in ranks for block in rank["blocks"]]
    assert [len(rank["blocks"]) for rank in ranks] == [3 * 2 * 4] * 2
    assert len(set(blocks)) == len(blocks)
    # Together they read the stream's beginning, and all of it.
    plan = parse_plan([*stream, "--max_steps", "3", "--shuffle_buffer", "1"])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    text = load_training_text(plan, tokenizer)
    ahead = [tuple(item["input_ids"].tolist()) for item, _ in zip(text.train, blocks, strict=False)]
    assert set(blocks) == set(ahead)
    assert len([row for row in history("out") if "throughput/eta_seconds" in row]) == 3


def launch(*words: str) -> tuple[str, str]:
    """Run a program under `accelerate launch` on two processes."""
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", "0"]
    with start(*accelerate, *words, env={**os.environ, "PYTHON_EXEC": as_python()}) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    return out, errors


def test_the_cards_command_runs_under_accelerate(corpus_cache: Path) -> None:
    assert "-m hf_pss.cli train --config" in (TINY.parent / "README.md").read_text(encoding="utf-8")
    out, errors = launch("-m", "hf_pss.cli", "train", *FIVE_STEPS, "--output_dir", "out")
    assert "2,048 tokens a step" in errors
    assert out.count("validation perplexity") == 1  # the first process alone prints the summary
    assert Path("out/model.safetensors").exists()


# ---- the script ----


def test_the_script_pretrains_and_resumes(
    rows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.SIZES, "124m", (2, 32, 2))
    words = [*rows, "--context_length", "32", "--per_device_train_batch_size", "4", "--use_cpu"]
    words += ["--max_validation_blocks", "4", "--disable_tqdm", "true", "--eval_steps", "3"]
    words += ["--lr_scheduler_type", "constant", "--save_steps", "3", "--streaming"]
    words += ["--pss_preset", "floor", "--report_to", "none"]
    script.main(*script.parse([*words, "--max_steps", "6", "--output_dir", "whole"]))
    script.main(*script.parse([*words, "--max_steps", "3", "--output_dir", "parts"]))
    resume = ["--resume_from_checkpoint", "true"]
    script.main(*script.parse([*words, *resume, "--max_steps", "6", "--output_dir", "parts"]))
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 6
    assert sum("eval_loss" in row for row in history("whole")) == 2
    tokenizer = AutoTokenizer.from_pretrained("whole")
    assert AutoModelForCausalLM.from_pretrained("whole").config.vocab_size == 320 > len(tokenizer)


def test_the_script_packs_documents_without_padding(rows: tuple[str, ...], tmp_path: Path) -> None:
    words = [*rows, "--context_length", "32", "--use_cpu", "--output_dir", "out"]
    given, arguments = script.parse(words)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    train, validation = script.load_text(given, arguments, tokenizer)
    assert {len(block) for block in [*train["input_ids"], *validation["input_ids"]]} == {32}
    text = tokenizer.decode(train["input_ids"][0])
    assert text.startswith("document ")
    assert "it.<|endoftext|>document" in text


def test_the_script_refuses_a_mistaken_option(tmp_path: Path) -> None:
    path = tmp_path / "mistaken.yaml"
    path.write_text("learning_rat: 1e-3\n", encoding="utf-8")
    for words in (["--config", str(path)], ["--learning_rat", "1"], ["--tokens_per_step", "100"]):
        with pytest.raises(ValueError, match=r"not used|Unknown arguments|not a multiple"):
            script.parse([*words, "--use_cpu"])
