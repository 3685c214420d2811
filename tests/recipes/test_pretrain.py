from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from preloaded import PATIENCE_SECONDS, as_python, start
from scripts import RECIPES, load_script
from small_library import use_small_library
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_pss.cli.app import app
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


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use_small_library(monkeypatch)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def stream(tmp_path: Path) -> tuple[str, ...]:
    """Options that train a small model on a stream of files, with a tokenizer from a folder."""
    texts = [f"document {i}: the quick brown fox jumps over it." for i in range(NUM_DOCUMENTS)]
    for part in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::2]]
        (tmp_path / f"part{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(texts, vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    own = ("--dataset", str(tmp_path / "part*.jsonl"), "--streaming")
    return (*SMALL, *own, "--tokenizer", str(tmp_path / "tokenizer"), "--logging_steps", "1")


def history(folder: str) -> list[dict[str, Any]]:
    state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    return state["log_history"]


def losses(folder: str) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


# ---- the files ----


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses(path: Path) -> None:
    arguments, model, data, training = script.parse(["--config", str(path)])
    assert bool(arguments.model_size) != bool(model.model_config)
    assert data.context_length > 1
    assert training.max_steps > 0
    assert path.parent.name in training.output_dir


def test_there_is_a_twin_at_every_rate() -> None:
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in BIG.glob("*.yaml")}
    for suffix, factor in (("", 1), ("_lr3x", 3), ("_lr5x", 5)):
        plain, pss = recipes.pop(f"plain{suffix}"), recipes.pop(f"pss{suffix}")
        assert float(pss["learning_rate"]) == pytest.approx(6e-4 * factor)
        differing = {key for key in plain if plain[key] != pss.get(key)}
        assert plain.keys() - pss.keys() == {"pss_observe_only"}
        assert differing == {"pss_observe_only", "output_dir"}
    assert recipes == {}


def test_every_command_of_a_card_has_its_files() -> None:
    for card in RECIPES.glob("gpt2_*/README.md"):
        words = card.read_text(encoding="utf-8").split()
        files = [word for word in words if word.startswith("recipes/")]
        assert any(word.endswith("pretrain_gpt2.py") for word in files), card
        for name in files:
            assert (ROOT / name).exists(), (card, name)


@pytest.mark.parametrize(
    ("size", "num_params"),
    [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1.5b", 1_557_611_200)],
)
def test_sizes_are_gpt2s(size: str, num_params: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**script.SIZES[size]))
    assert model.num_parameters() == num_params


# ---- options ----


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 40), (8, 5), (20, 2)])
def test_tokens_a_step_do_not_depend_on_the_number_of_devices(
    world_size: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    words = ["--config", str(BIG / "pss.yaml"), "--use_cpu"]
    known = script.parser_of("out").parse_known_args(
        [*script.words_of_file(BIG / "pss.yaml", script.parser_of("out")), *words]
    )[0]
    assert script.micro_batches(known) == micro_batches


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens_per_step", "100"), "100 tokens a step are no multiple of the 2048"),
        (("--tokens_per_step", "4096", "--gradient_accumulation_steps", "2"), "one of the two"),
        (("--tokens_per_step", "0"), "at least 1"),
        (("--shufle_buffer", "3"), "Did you mean shuffle_buffer"),
        (("--model_size", "3b"), "model_size"),
        (("--config", "gone.yaml"), "gone.yaml cannot be read"),
    ],
)
def test_a_mistaken_option_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        script.parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "You gave no model"),
        (("--report_to", "abacus"), "report to abacus, which is not installed"),
        (("--model_size", "124m", "--model_config", "gpt2"), "--model_size and --model_config"),
        ((*SMALL, "--streaming", "--tokenizer", "nowhere"), "no tokenizer of that name"),
    ],
)
def test_a_run_that_cannot_begin_says_why(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.run([*words, "--max_tokens", "20000", "--vocab_size", "300", "--use_cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_stream_needs_an_end(stream: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(stream) == 2
    assert "--max_steps" in capsys.readouterr().err
    assert script.run([*stream, "--max_steps", "1", "--max_tokens", "9"]) == 2
    assert "--max_tokens has no effect" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(["--help"]) == 0
    page = capsys.readouterr().out
    for word in ("--config recipes/gpt2_tiny_cpu/pss.yaml", "--tokens_per_step", "--text_column"):
        assert word in page
    assert script.run(["--help-all"]) == 0
    page = capsys.readouterr().out
    for word in ("--adam_beta2", "--pss_cooldown_steps", "--shuffle_buffer"):
        assert word in page


# ---- runs ----


def test_the_tiny_recipe_leaves_what_plain_transformers_loads() -> None:
    assert script.run([*FIVE_STEPS, "--logging_steps", "1", "--output_dir", "out"]) == 0
    for folder in ("out", "out/checkpoint-5"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer) == 2048
    rows = history("out")
    assert sum("throughput/tokens_per_second" in row for row in rows) == 5
    assert sum("eval_perplexity" in row for row in rows) == 1
    assert [row["step"] for row in rows if "pss/grad_norm_preclip" in row] == [1, 2, 3, 4, 5]


def test_the_command_line_and_the_script_train_the_same_run() -> None:
    words = [*FIVE_STEPS, "--logging_steps", "1", "--output_dir"]
    assert script.run([*words, "script"]) == 0
    result = CliRunner().invoke(app, ["train", *words, "command"])
    assert result.exit_code == 0, result.stderr
    assert losses("script") == losses("command")


def test_the_script_runs_as_the_card_says() -> None:
    words = [sys.executable, "recipes/pretrain_gpt2.py", *FIVE_STEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--output_dir", str(Path.cwd() / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "gpt2, 535,168 parameters; 1,024 tokens a step" in done.stdout
    assert Path("out/model.safetensors").exists()


def test_a_vocabulary_is_rounded_up(stream: tuple[str, ...]) -> None:
    assert script.run([*stream, "--max_steps", "1", "--output_dir", "out"]) == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    assert len(AutoTokenizer.from_pretrained("out")) <= 300
    assert model.config.vocab_size % script.VOCAB_MULTIPLE == 0


def test_a_stream_resumes_as_if_never_interrupted(stream: tuple[str, ...]) -> None:
    words = [*stream, "--lr_scheduler_type", "constant", "--save_steps", "3", "--max_steps"]
    assert script.run([*words, "6", "--output_dir", "whole"]) == 0
    assert script.run([*words, "3", "--output_dir", "parts"]) == 0
    go_on = ("--output_dir", "parts", "--resume_from_checkpoint")
    assert script.run([*words, "6", *go_on, "true"]) == 0
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 6
    assert script.run([*words, "3", *go_on, "false"]) == 0, "false is no folder's name"
    assert losses("parts") == losses("whole")[:3]


# torch's own tracer looks at the gradient of the logits, which are no leaf (2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_is_watched_as_any_other(stream: tuple[str, ...]) -> None:
    words = [
        *stream,
        "--max_steps",
        "2",
        "--pss_preset",
        "anchored",
        "--pss_health_every_steps",
        "1",
    ]
    compiled = ("--torch_compile_backend", "eager")
    assert script.run([*words, "--output_dir", "plain"]) == 0
    assert script.run([*words, *compiled, "--output_dir", "compiled"]) == 0
    assert losses("compiled") == losses("plain")
    health = [Path(folder, "pss_health.jsonl").read_text() for folder in ("compiled", "plain")]
    assert health[0] == health[1] != ""
    assert AutoModelForCausalLM.from_pretrained("compiled").num_parameters() > 0


def test_two_ranks_read_one_stream_and_no_block_twice(
    stream: tuple[str, ...], tmp_path: Path
) -> None:
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", "0"]
    worker = Path(__file__).parent / "pretrain_worker.py"
    # Two ranks take 4 sequences of 32 tokens at once: 512 are two micro-batches each.
    words = [*stream, "--max_steps", "3", "--tokens_per_step", "512", "--shuffle_buffer", "1"]
    env = {**os.environ, "PYTHON_EXEC": as_python()}
    with start(*accelerate, worker, tmp_path, *words, env=env) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "512 tokens a step: 2 × 4 sequences of 32, on 2 processes" in out
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    blocks = [tuple(block) for rank in ranks for block in rank["blocks"]]
    assert [len(rank["blocks"]) for rank in ranks] == [3 * 2 * 4] * 2
    assert len(set(blocks)) == len(blocks)
    # Together they read the stream's beginning, and all of it.
    options = script.parse([*words, "--tokens_per_step", "256"])[:3]
    text = script.load_text(*options, script.find_tokenizer(*options), seed=42)
    ahead = [tuple(item["input_ids"].tolist()) for item, _ in zip(text.train, blocks, strict=False)]
    assert set(blocks) == set(ahead)
    rows = [row for row in history("out") if "throughput/eta_seconds" in row]
    assert len(rows) == 3
