from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from commandline import PROSE, SHORT, Run
from transformers import AutoModelForCausalLM, AutoTokenizer

# A model, but no causal one.
T5 = ("--model_config", "t5", "--model_overrides", "num_layers=1")
RECIPE = Path(__file__).parents[2] / "recipes" / "gpt2_tiny_cpu" / "pss.yaml"


def rows() -> list[str]:
    return [PROSE[i : i + 500] for i in range(0, len(PROSE), 500)]


def numbers(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_help_teaches(run: Run) -> None:
    output = run("train", "--help").output
    for word in ("--model_config", "--dataset", "--pss_preset", "--help-all", "Exit codes"):
        assert word in output
    assert output.count("hf-pss train --") >= 4


def test_help_all_lists_every_argument(run: Run) -> None:
    result = run("train", "--help-all")
    assert result.exit_code == 0
    for word in ("--adam_beta2", "--pss_cooldown_steps", "--text_column"):
        assert word in result.output


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_trains_on_a_local_file(train: Run, tmp_path: Path, text_file: Path, ending: str) -> None:
    table = datasets.Dataset.from_dict({"body": rows()})
    if ending == "jsonl":
        text_file = tmp_path / "prose.jsonl"
        table.to_pandas().to_json(text_file, orient="records", lines=True)
    elif ending == "parquet":
        text_file = tmp_path / "prose.parquet"
        table.to_pandas().to_parquet(text_file)
    column = () if ending == "txt" else ("--text_column", "body")
    result = train("--dataset", text_file, *column, "--output_dir", "out")
    assert result.exit_code == 0, result.stderr
    for line in ("validation perplexity", "interventions", "non-finite steps", "overhead of PSS"):
        assert line in result.stdout
    assert "validation loss" in result.stderr  # a line an evaluation


def test_saved_model_loads_and_writes(train: Run, text_file: Path) -> None:
    assert train("--dataset", text_file, "--output_dir", "out").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.vocab_size == len(tokenizer) == 300
    words = tokenizer("the quick", return_tensors="pt")
    written = model.generate(**words, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the quick")


def test_trains_on_the_built_in_corpus_from_the_recipe(run: Run) -> None:
    result = run(
        *("train", "--config", RECIPE, "--max_tokens", "100000", "--max_steps", "5"),
        *("--max_validation_blocks", "8", "--use_cpu", "--output_dir", "out"),
        *("--lr_scheduler_kwargs", '{"num_decay_steps": 2}', "--warmup_steps", "1"),
    )
    assert result.exit_code == 0, result.stderr
    assert "535,168 parameters" in result.stderr.replace("\n", " ")
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["n_layer"] == 8


def test_fine_tunes_a_model_with_its_own_tokenizer(train: Run, run: Run, text_file: Path) -> None:
    assert train("--dataset", text_file, "--output_dir", "base").exit_code == 0
    common = ("--max_tokens", "100000", "--vocab_size", "2048")
    result = run("train", "--model", "base", *SHORT, *common, "--output_dir", "tuned")
    assert result.exit_code == 0, result.stderr
    assert len(AutoTokenizer.from_pretrained("tuned")) == 300


def test_resumes_as_if_never_interrupted(train: Run, text_file: Path) -> None:
    words = (
        *("--dataset", text_file, "--save_steps", "3", "--logging_steps", "1"),
        *("--lr_scheduler_type", "constant"),
    )
    assert train(*words, "--output_dir", "whole").exit_code == 0
    assert train(*words, "--output_dir", "parts", "--max_steps", "3").exit_code == 0
    result = train(*words, "--output_dir", "parts", "--resume")
    assert result.exit_code == 0, result.stderr
    assert "resumed from parts/checkpoint-3" in result.stderr.replace("\n", " ")
    assert numbers(Path("parts")) == numbers(Path("whole"))
    whole, parts = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    again = train(*words, "--output_dir", "parts")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    assert train(*words, "--output_dir", "parts", "--overwrite").exit_code == 0
    done = train(*words, "--output_dir", "parts", "--resume_from_checkpoint", "true")
    assert done.exit_code == 0, done.stderr  # nothing left to do


def test_interrupted_run_says_how_to_go_on(train: Run, text_file: Path) -> None:
    def interrupt() -> None:
        while not Path("out/checkpoint-2/trainer_state.json").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    words = ("--max_steps", "100000", "--save_steps", "2", "--eval_strategy", "no")
    result = train("--dataset", text_file, "--output_dir", "out", *words)
    assert result.exit_code == 130
    assert "--resume" in result.stderr


def test_nonfinite_stop_has_its_own_exit_code(train: Run, text_file: Path) -> None:
    words = ("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0")
    result = train("--dataset", text_file, *words, "--pss_on_nonfinite", "stop")
    assert result.exit_code == 3
    assert "Stopped before the update of step" in result.stderr.replace("\n", " ")


def test_nonfinite_steps_are_counted(train: Run, text_file: Path) -> None:
    words = ("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0")
    result = train("--dataset", text_file, *words)
    assert result.exit_code == 0, result.stderr
    count = next(line for line in result.stdout.splitlines() if "non-finite steps" in line)
    assert " 0 " not in count
    loss = next(line for line in result.stdout.splitlines() if "train loss" in line)
    assert "nan" in loss  # the Trainer's filter logs 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataset", "missing.txt"), "There is no file missing.txt"),
        (("--dataset", "empty.txt"), "empty.txt is empty"),
        (("--dataset", "rows.jsonl"), "rows.jsonl has no column 'text'; it has 'body'"),
        (("--dataset", "prose.txt", "--context_length", "64"), "reads at most 32"),
        (("--dataset", "prose.txt", "--context_length", "100000"), "too few for one block"),
        (("--dataset", "prose.txt", "--model_overrides", "n_layers=2"), "Did you mean n_layer"),
        (("--dataset", "prose.txt", "--model_overrides", "n_layer"), "takes name=value"),
        (("--dataset", "prose.txt", "--model_overrides", "{n_layer: 2"), "takes name=value"),
        (("--dataset", "prose.txt", "--model_overrides", "n_layer=two"), "config cannot hold"),
        (("--dataset", "prose.txt", "--model_overrides", "n_embd=33"), "No causal language model"),
        (("--dataset", "prose.txt", "--model_config", "gpt3"), "Did you mean gptj or gpt2"),
        (("--dataset", "prose.txt", *T5), "No causal language model"),
        (("--dataset", "prose.txt", "--model_config", "gone.json"), "gone.json cannot be read"),
        (("--dataset", "prose.txt", "--tokenizer", "nowhere"), "the Hub gave no tokenizer"),
        (("--dataset", "prose.txt", "--vocab_size", "10"), "vocabulary of 10"),
        (("--model", "gpt2"), "Give one of them"),
        (("--dataset", "nobody/nothing"), "the Hub gave no dataset of that name"),
        (("--dataset", "broken.jsonl"), "broken.jsonl could not be read"),
        (("--max_validation_blocks", "0"), "max_validation_blocks must be at least 1"),
        (("--output_dir", "prose.txt"), "The folder prose.txt cannot be made"),
        (("--report_to", "abacus"), "report to abacus, which is not installed or not known"),
        (("--resume",), "no checkpoint to resume from"),
        (("--resume_from_checkpoint", "prose.txt"), "no complete checkpoint"),
    ],
)
def test_mistake(train: Run, text_file: Path, words: tuple[str, ...], message: str) -> None:
    Path("empty.txt").touch()
    Path("rows.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    Path("broken.jsonl").write_text('{"text": "cut', encoding="utf-8")
    result = train(*words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_model_that_the_hub_does_not_give(run: Run, text_file: Path) -> None:
    result = run("train", "--model", "nobody/nothing", "--dataset", text_file, *SHORT)
    assert result.exit_code == 2
    assert "There is no folder 'nobody/nothing', and the Hub gave no model" in result.stderr


def test_nothing_to_train(run: Run, text_file: Path) -> None:
    result = run("train", "--dataset", text_file, *SHORT)
    assert result.exit_code == 2
    assert "Say what to train" in result.stderr


def test_config_file_with_sizes(run: Run, text_file: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    Path("llama.json").write_text(json.dumps(sizes), encoding="utf-8")
    words = ("--model_config", "llama.json", "--model_overrides", "num_hidden_layers=2")
    result = run("train", *words, "--dataset", text_file, *SHORT, "--output_dir", "out")
    assert result.exit_code == 0, result.stderr
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 2
