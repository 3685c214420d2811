from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from helpers import events_of
from peft import AutoPeftModelForCausalLM
from preloaded import as_python, start
from scripts import RECIPES, load_script
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_offline import finish_and_read

script = load_script("finetune_llm")
make_model = load_script("llm_tiny_cpu/make_model")

TINY = RECIPES / "llm_tiny_cpu"
KINDS = ("full", "lora")

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
    return [*(word for pair in given.items() for word in pair), "--disable_tqdm", "true", *more]


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


# ---- saved files ----


def test_plain_transformers_loads_a_full_run(base: Path) -> None:
    trainer = train(words_of(base, "full"))
    assert len(losses("out")) == 5
    assert all(map(math.isfinite, losses("out")))
    for folder in ("out", "out/checkpoint-5"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(model), logits_of(trainer.model))
        assert AutoTokenizer.from_pretrained(folder).chat_template
    start = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.equal(start, logits_of(trainer.model))


def test_peft_loads_the_adapter_of_a_lora_run(base: Path) -> None:
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
    train(words_of(base, kind, *rest, "--max_steps", "6"))
    parts = ("--output_dir", "parts")
    train(words_of(base, kind, *rest, *parts, "--max_steps", "3"))
    resume = ("--resume_from_checkpoint", "true", "--max_steps", "6")
    train(words_of(base, kind, *rest, *parts, *resume))
    assert losses("parts") == losses("out")
    assert len(losses("out")) == 6


def test_pss_acts_in_a_full_run(base: Path) -> None:
    floor = ("--pss_floor_ratio", "1.3", "--pss_check_every_steps", "1")
    train(words_of(base, "full", *floor, "--pss_floor_reference", "noise", "--max_steps", "2"))
    assert {event["step"] for event in events_of(Path("out"))} == {1, 2}


def test_weights_and_biases_logs_offline(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODE", "offline"), ("DIR", str(Path.cwd())), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(words_of(base, "lora", "--report_to", "wandb", "--max_steps", "2"))
    assert "train/pss/interventions" in {key for row in finish_and_read().history for key in row}


# ---- labels ----


def test_only_the_assistants_turns_are_learned(base: Path) -> None:
    trainer = train(words_of(base, "full", "--max_steps", "1"))
    pairs = learned_and_whole(trainer)
    assert len(pairs) == 8
    for learned, whole in pairs:
        assert learned == answers_in(whole) != ""
        assert "User:\n" in whole


def test_every_token_is_learned_on_request(base: Path) -> None:
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


def test_rows_keep_only_the_columns_that_trl_reads(tmp_path: Path) -> None:
    # As in UltraChat: a prompt without completion beside the messages.
    asked = {"prompt": "Hi.", "messages": [turn("user", "Hi.")]}
    answered = {"prompt": "Hi.", "messages": [turn("user", "Hi."), turn("assistant", "Hello.")]}
    name = write_rows(tmp_path / "rows.jsonl", [asked, *[answered] * 9])
    found = script.load_conversations(script.ScriptArguments(dataset=name))
    assert found.column_names == ["messages"]
    assert len(found) == 9  # the row without an answer is left out
    some = script.ScriptArguments(dataset=name, max_rows=4)
    assert len(script.load_conversations(some)) == 3


def test_nothing_is_evaluated_where_nothing_is_held_out(base: Path) -> None:
    trainer = train(words_of(base, "full", "--validation_fraction", "0", "--max_steps", "1"))
    assert not any("eval_loss" in row for row in trainer.state.log_history)


# ---- templates ----


def test_the_files_template_serves_a_model_without_one(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    tokenizer.save_pretrained(tmp_path / "bare")
    words = ("--model_name_or_path", str(tmp_path / "bare"), "--max_steps", "1")
    with pytest.raises(ValueError, match=r"has no chat template.*--chat_template_path"):
        train(words_of(base, "full", *words))
    train(words_of(base, "full", *words, "--chat_template_path", str(TINY / "chat.jinja")))


# ---- options ----


def test_the_default_rate_of_an_adapter_is_ten_times_higher(base: Path) -> None:
    given = ("--use_cpu", "true", "--dataset", "any")
    for words, rate in (
        ((), 2e-5),
        (("--use_peft",), 2e-4),
        (("--use_peft", "--learning_rate", "1e-3"), 1e-3),
    ):
        _, model, training = script.parse([*given, *words])
        assert script.learning_rate(model, training) == rate
        assert model.lora_target_modules == "all-linear"
    assert script.parse(words_of(base, "lora"))[2].learning_rate == 3e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model_name_or_path", "./nowhere"), "nowhere"),
        (("--dataset", "gone.jsonl"), "gone.jsonl"),
        (("--dataset", "texts.jsonl"), "prompt"),
        (("--dataset", "odd.jsonl"), "Write a message as"),
        (("--resume_from_checkpoint", "true"), "No valid checkpoint"),
        (("--resume_from_checkpoint", "gone"), "gone"),
        (("--lora_rank", "8"), "lora_rank"),
    ],
)
def test_a_run_that_cannot_begin_names_the_reason(
    base: Path, words: tuple[str, ...], message: str
) -> None:
    write_rows(Path("texts.jsonl"), [{"text": "Hello."}])
    write_rows(Path("odd.jsonl"), [{"messages": "Hello."}])
    with pytest.raises((ValueError, OSError), match=message):
        train(words_of(base, "lora", *words))


# ---- the card ----


def commands_of(card: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
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
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    state = json.loads(Path("runs/llm_tiny_cpu/lora/trainer_state.json").read_text())
    assert state["train_batch_size"] == 8  # on each of two processes
    AutoPeftModelForCausalLM.from_pretrained("runs/llm_tiny_cpu/lora")
