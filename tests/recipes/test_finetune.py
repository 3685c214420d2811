from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import trl
from helpers import events_of
from helpers import train as train_tiny
from peft import AutoPeftModelForCausalLM
from preloaded import as_python, start
from scripts import RECIPES, load_script
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import get_training_chat_template
from wandb_offline import finish_and_read

from hf_pss import PSSConfig
from hf_pss.errors import ConfigurationError

script = load_script("finetune_llm")
make_model = load_script("llm_tiny_cpu/make_model")

TINY = RECIPES / "llm_tiny_cpu"
KINDS = ("full", "lora")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

PAIRS = [{"prompt": f"Say {i}.", "completion": f"Here it is: {i}."} for i in range(12)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "base"
    make_model.main(folder)
    return folder


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def words_of(base: Path, kind: str, *more: str) -> list[str]:
    """Return the tiny recipe's words, for five steps, with paths that hold from anywhere."""
    given = {
        "--config": str(TINY / f"{kind}.yaml"),
        "--model_name_or_path": str(base),
        "--dataset": str(TINY / "chat.jsonl"),
        "--output_dir": "out",
        "--max_steps": "5",
        "--warmup_steps": "1",
        "--logging_steps": "1",
        "--eval_steps": "5",
        "--save_steps": "5",
    }
    return [*(word for pair in given.items() for word in pair), "--disable_tqdm", *more]


def train(words: Sequence[str]) -> Any:
    return script.main(*script.parse(words))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


def losses(folder: str) -> list[float]:
    state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def learned_and_whole(trainer: Any) -> list[tuple[str, str]]:
    """Return, for each row of a batch, the text whose tokens are learned, and all of it."""
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    pairs = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        is_learned = labels != -100
        assert torch.equal(ids[is_learned], labels[is_learned])
        pairs.append((tokenizer.decode(ids[is_learned]), tokenizer.decode(ids)))
    return pairs


def answers_in(text: str) -> str:
    return "".join(re.findall(r"Assistant:\n(.*?<\|endoftext\|>)", text))


# ---- what is left behind ----


def test_a_full_run_leaves_what_plain_transformers_loads(base: Path) -> None:
    trainer = train(words_of(base, "full"))
    assert len(losses("out")) == 5
    assert all(map(math.isfinite, losses("out")))
    for folder in ("out", "out/checkpoint-5"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(model), logits_of(trainer.model))
        assert AutoTokenizer.from_pretrained(folder).chat_template
    start = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.equal(start, logits_of(trainer.model))


def test_a_lora_run_leaves_an_adapter_that_peft_loads(base: Path) -> None:
    trainer = train(words_of(base, "lora"))
    assert len(losses("out")) == 5
    assert all(map(math.isfinite, losses("out")))
    for folder in ("out", "out/checkpoint-5"):
        assert not Path(folder, "model.safetensors").exists()
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(model), logits_of(trainer.model))
    start = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.equal(start, logits_of(trainer.model))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 7  # two factors, four layers, seven matrices a layer
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_as_if_never_interrupted(base: Path, kind: str) -> None:
    rest = ("--lr_scheduler_type", "constant", "--save_steps", "3", "--eval_steps", "6")
    assert script.run(words_of(base, kind, *rest, "--max_steps", "6")) == 0
    parts = ("--output_dir", "parts")
    assert script.run(words_of(base, kind, *rest, *parts, "--max_steps", "3")) == 0
    go_on = ("--resume_from_checkpoint", "true", "--max_steps", "6")
    assert script.run(words_of(base, kind, *rest, *parts, *go_on)) == 0
    assert losses("parts") == losses("out")
    assert len(losses("out")) == 6


def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(tmp_path, PSSConfig.preset("paper"), max_steps=4, save_steps=2)
    archive = tmp_path / "checkpoint-4" / "scheduler.pt"
    archive.write_bytes(bytes(archive.stat().st_size))  # the size that the marker names
    given = script.FinetuneArguments(
        output_dir=str(tmp_path), resume_from_checkpoint="true", use_cpu=True, report_to="none"
    )
    assert script.find_checkpoint(given) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is passed over: scheduler.pt was not written to its end" in caplog.text


def test_pss_acts_in_a_full_run(base: Path) -> None:
    floor = ("--pss_floor_ratio", "1.3", "--pss_check_every_steps", "1")
    train(words_of(base, "full", *floor, "--pss_floor_reference", "noise", "--max_steps", "2"))
    assert {event["step"] for event in events_of(Path("out"))} == {1, 2}


def test_weights_and_biases_hears_offline(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODE", "offline"), ("DIR", str(Path.cwd())), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(words_of(base, "lora", "--report_to", "wandb", "--max_steps", "2"))
    assert "train/pss/interventions" in {key for row in finish_and_read().history for key in row}


# ---- what is learned ----


def test_only_what_the_assistant_says_is_learned(base: Path) -> None:
    trainer = train(words_of(base, "full", "--max_steps", "1"))
    pairs = learned_and_whole(trainer)
    assert len(pairs) == 8
    for learned, whole in pairs:
        assert learned == answers_in(whole) != ""
        assert "User:\n" in whole


def test_every_token_is_learned_where_asked_for(base: Path) -> None:
    trainer = train(words_of(base, "full", "--max_steps", "1", "--assistant_only_loss", "false"))
    for learned, whole in learned_and_whole(trainer):
        assert learned.startswith(("User:\n", "System:\n"))
        assert learned != answers_in(whole)


@pytest.mark.parametrize("form", ["text", "turns"])
def test_a_completion_is_learned_through_any_template(
    base: Path, form: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = PAIRS
    if form == "turns":
        rows = [
            {
                "prompt": [turn("user", "Hello."), turn("assistant", "Yes?"), turn("user", "Go.")],
                "completion": [turn("assistant", pair["completion"])],
            }
            for pair in PAIRS
        ]
    template = (TINY / "chat.jinja").read_text(encoding="utf-8")
    unmarked = tmp_path / "unmarked.jinja"
    unmarked.write_text(re.sub(r"\{%- (end)?generation -%\}", "", template), encoding="utf-8")
    given = ("--dataset", write_rows(tmp_path / "rows.jsonl", rows), "--max_steps", "1")
    trainer = train(words_of(base, "full", *given, "--chat_template_path", str(unmarked)))
    completions = {f"{pair['completion']}<|endoftext|>" for pair in PAIRS}
    for learned, whole in learned_and_whole(trainer):
        assert learned.rstrip("\n") in completions
        assert whole.startswith("User:\n")


def test_rows_keep_what_trl_reads_and_no_more(tmp_path: Path) -> None:
    # As in UltraChat: a prompt without completion beside the messages.
    asked = {"prompt": "Hi.", "messages": [turn("user", "Hi.")]}
    answered = {"prompt": "Hi.", "messages": [turn("user", "Hi."), turn("assistant", "Hello.")]}
    name = write_rows(tmp_path / "rows.jsonl", [asked, *[answered] * 9])
    found = script.load_conversations(script.ScriptArguments(dataset=name), seed=0)
    assert found.train.column_names == ["messages"]
    assert (len(found.train), len(found.validation)) == (8, 1)
    whole = script.ScriptArguments(dataset=name, validation_fraction=0.0, max_rows=4)
    found = script.load_conversations(whole, seed=0)
    assert (len(found.train), found.validation) == (3, None)


def test_nothing_is_evaluated_where_nothing_is_held_out(base: Path) -> None:
    trainer = train(words_of(base, "full", "--validation_fraction", "0", "--max_steps", "1"))
    assert not any("eval_loss" in row for row in trainer.state.log_history)


# ---- templates ----


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "gemma3", "phi3"])
def test_trls_version_of_a_known_template_is_taken(base: Path, name: str) -> None:
    training = script.parse(words_of(base, "full"))[2]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    script.check_template(tokenizer, training)
    assert "generation" in get_training_chat_template(tokenizer)


def test_a_template_without_marks_says_what_to_do(base: Path) -> None:
    training = script.parse(words_of(base, "full"))[2]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigurationError, match="does not mark what the assistant says"):
        script.check_template(tokenizer, training)
    training.assistant_only_loss = False
    script.check_template(tokenizer, training)


def test_a_base_models_tokenizer_needs_a_template(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    training = script.parse(words_of(base, "full"))[2]
    with pytest.raises(ConfigurationError, match=r"has no chat template.*--chat_template_path"):
        script.check_template(tokenizer, training)
    for path in (TINY / "chat.jinja", base):  # a file, or another's tokenizer
        given = words_of(base, "full", "--chat_template_path", str(path))
        script.check_template(tokenizer, script.parse(given)[2])
    training.chat_template_path = "gone.jinja"
    with pytest.raises(ConfigurationError, match=r"gone\.jinja cannot be read"):
        script.check_template(tokenizer, training)


# ---- options ----


def test_an_adapter_learns_ten_times_as_fast_unless_told(base: Path) -> None:
    assert script.parse(["--use_cpu"])[2].learning_rate == 2e-5
    assert script.parse(["--use_cpu", "--use_peft"])[2].learning_rate == 2e-4
    given = script.parse(["--use_cpu", "--use_peft", "--learning_rate", "1e-3"])
    assert given[2].learning_rate == 1e-3
    assert script.parse(words_of(base, "lora"))[2].learning_rate == 3e-3
    assert script.parse(["--use_cpu"])[1].lora_target_modules == "all-linear"


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_four_bits_without_bitsandbytes_say_what_to_install(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.run(words_of(base, "lora", "--load_in_4bit")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_whole_weights_come_from_the_checkpoint(base: Path) -> None:
    _, model, _ = script.parse(words_of(base, "full"))
    assert script.weights_to_load(model, None) == str(base)
    assert script.weights_to_load(model, str(base)) == str(base)
    _, model, _ = script.parse(words_of(Path("elsewhere"), "full"))
    assert script.weights_to_load(model, str(base)) == str(base)
    assert script.weights_to_load(model, ".") == "elsewhere"  # a checkpoint in shards
    _, model, _ = script.parse(words_of(Path("elsewhere"), "lora"))
    assert script.weights_to_load(model, str(base)) == "elsewhere"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--load_in_4bit", "--use_peft", "false"), "add --use_peft"),
        (("--max_length", "257"), "reads at most 256 tokens"),
        (("--model_name_or_path", "./nowhere"), "No model can be loaded"),
        (("--dataset", "gone.jsonl"), "There is no file gone.jsonl"),
        (("--dataset", "texts.jsonl"), "columns 'text'"),
        (("--dataset", "odd.jsonl"), "are no conversations"),
        (("--dataset", "asked.jsonl"), "has a turn of the role 'assistant'"),
        (("--max_rows", "1"), "too few to hold one out"),
        (("--max_rows", "0"), "at least 1"),
        (("--validation_fraction", "1"), "below 1"),
        (("--resume_from_checkpoint", "true"), "no checkpoint to go on from"),
        (("--resume_from_checkpoint", "gone"), "no complete checkpoint"),
        (("--report_to", "abacus"), "report to abacus, which is not installed"),
        (("--lora_rank", "8"), "Did you mean"),
    ],
)
def test_a_run_that_cannot_begin_says_why(
    base: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("texts.jsonl"), [{"text": "Hello."}])
    write_rows(Path("odd.jsonl"), [{"messages": "Hello."}])
    write_rows(Path("asked.jsonl"), [{"messages": [turn("user", "Hello?")]}])
    assert script.run(words_of(base, "lora", *words)) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert script.run(["--use_cpu"]) == 2
    assert "--model_name_or_path" in capsys.readouterr().err
    assert script.run(["--use_cpu", "--model_name_or_path", str(base), "--max_length", "64"]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(["--help"]) == 0
    page = capsys.readouterr().out
    for word in ("recipes/llm_tiny_cpu/lora.yaml", "--validation_fraction", "--lora_r", "-100"):
        assert word in page
    assert script.run(["--help-all"]) == 0
    page = capsys.readouterr().out
    for word in ("--packing", "--pss_cooldown_steps", "--lora_r", "2e-05"):
        assert word in page


# ---- as the card says ----


def commands_of(card: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_card_s_launch_runs_as_it_stands(tmp_path: Path) -> None:
    make, *_, launch = [line for line in commands_of(TINY / "README.md") if "recipes/" in line]
    (tmp_path / "recipes").symlink_to(RECIPES)
    assert make == "python recipes/llm_tiny_cpu/make_model.py"
    make_model.main(make_model.FOLDER)
    words = launch.split()
    assert words[0] == "accelerate"
    # The launcher's own options stand before the script; port 0 lets it choose.
    words[2:2] = ["--main_process_port", "0"]
    env = {**os.environ, "PYTHON_EXEC": as_python(), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    program = ("-m", "accelerate.commands.launch", *words[2:], "--max_steps", "2")
    with start(*program, env=env) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "conversations, 16 a step" in out  # 8 on each of two processes
    AutoPeftModelForCausalLM.from_pretrained("runs/llm_tiny_cpu/lora")
