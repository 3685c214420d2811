from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from commandline import PROSE, SHORT, Run
from helpers import train as train_tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pss import PSSConfig
from hf_pss.cli.loading import load_training_text, make_config
from hf_pss.cli.parsing import parse_plan
from hf_pss.cli.progress import problem_of
from hf_pss.cli.resume import advice_after_failed_save, advice_after_failure
from hf_pss.cli.terminal import without_noise
from hf_pss.errors import ConfigurationError

# A model that is not causal.
T5 = ("--model_config", "t5", "--model_overrides", "num_layers=1")


def rows() -> list[str]:
    return [PROSE[i : i + 500] for i in range(0, len(PROSE), 500)]


def numbers(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_help_shows_options_and_examples(run: Run) -> None:
    output = run("train", "--help").output
    for word in ("--model_config", "--dataset", "--pss_preset", "--help-all", "Exit codes"):
        assert word in output
    assert output.count("hf-pss train --") >= 4


def test_help_all_lists_every_argument(run: Run) -> None:
    result = run("train", "--help-all")
    assert result.exit_code == 0
    for word in ("--adam_beta2", "--pss_cooldown_steps", "--text_column"):
        assert word in result.output


def test_trains_on_a_file_and_saves_a_model_that_writes(train: Run, text_file: Path) -> None:
    result = train("--dataset", text_file, "--output_dir", "out", "--pss_preset", "anchored")
    assert result.exit_code == 0, result.stderr
    for line in ("validation perplexity", "interventions", "non-finite steps", "overhead of PSS"):
        assert line in result.stdout
    assert "validation loss" in result.stderr  # a line an evaluation
    assert "PSS: preset anchored, 12 matrices watched" in " ".join(result.stderr.split())
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.vocab_size == len(tokenizer) == 300
    words = tokenizer("the quick", return_tensors="pt")
    written = model.generate(**words, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the quick")

    other = ("--dataset", text_file, "--vocab_size", "2048", "--output_dir", "tuned")
    assert (
        train("--model", "out", "--model_config", "", "--model_overrides", "", *other).exit_code
        == 0
    )
    assert len(AutoTokenizer.from_pretrained("tuned")) == 300


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_a_file_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"prose.{ending}"
    frame = datasets.Dataset.from_dict({"body": rows()}).to_pandas()
    if ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    words = ["--dataset", str(path), "--text_column", "body", "--context_length", "32"]
    text = load_training_text(parse_plan([*words, "--use_cpu", "--vocab_size", "300"]), None)
    assert text.train.blocks.shape[1] == 32
    assert len(text.validation) > 0


def test_muon_and_its_options_are_read(tmp_path: Path) -> None:
    path = tmp_path / "muon.yaml"
    path.write_text("pss_optim: muon\npss_optim_args: {others_lr: 3e-4}\n")
    words = ["--config", str(path), "--use_cpu"]
    arguments = parse_plan(words).arguments
    assert arguments.pss_optim == "muon"
    assert "others_lr" in str(arguments.pss_optim_args)
    with pytest.raises(ConfigurationError, match="Did you mean momentum"):
        parse_plan([*words, "--pss_optim_args", "momentun=0.9"])


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
    assert done.exit_code == 2  # the Trainer would take a sixth step
    assert "checkpoint-5 is already at --max_steps 5" in done.stderr
    fewer = train(*words, "--output_dir", "parts", "--resume", "--max_steps", "4")
    assert fewer.exit_code == 2
    assert "checkpoint-5 is already past --max_steps 4" in fewer.stderr


def test_resume_skips_a_damaged_checkpoint_and_logs_it(
    train: Run, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--dataset", text_file, "--output_dir", "out", "--save_steps", "2")
    assert train(*words, "--max_steps", "4").exit_code == 0
    _cut(Path("out/checkpoint-4/optimizer.pt"))
    result = train(*words, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "resumed from out/checkpoint-2" in result.stderr.replace("\n", " ")
    assert "out/checkpoint-4: optimizer.pt has" in caplog.text
    for folder in Path("out").glob("checkpoint-*"):
        _cut(folder / "optimizer.pt")
    result = train(*words, "--resume")
    assert result.exit_code == 2
    assert "No valid checkpoint found" in result.stderr.replace("\n", " ")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_resume_compares_options_with_those_of_the_run(train: Run, text_file: Path) -> None:
    words = ("--dataset", text_file, "--output_dir", "out", "--save_steps", "2")
    assert train(*words, "--max_steps", "2").exit_code == 0
    kept = json.loads(Path("out/hf_pss_options.json").read_text(encoding="utf-8"))
    assert kept["model_overrides"]["n_layer"] == 2
    resume = (*words, "--resume")
    for refused in (("--model_overrides", "n_layer=1"), ("--context_length", "16")):
        result = train(*resume, *refused)
        assert result.exit_code == 2
        assert f"this one has {' '.join(refused)}" in result.stderr
    shorter = text_file.with_name("shorter.txt")
    shorter.write_text(PROSE[:9000], encoding="utf-8")
    result = train(*resume, "--dataset", shorter, "--learning_rate", "0.5")
    assert result.exit_code == 0, result.stderr
    said = result.stderr.replace("\n", "")
    assert "began with --dataset" in said
    assert "--learning_rate 0.5 has no effect without --pss_lr_scale" in said.replace("  ", " ")
    assert json.loads(Path("out/hf_pss_options.json").read_text(encoding="utf-8")) == kept
    Path("out/hf_pss_options.json").write_text('{"version": 1}', encoding="utf-8")
    assert "cannot be read" in train(*resume, "--max_steps", "9").stderr


def test_a_resumed_run_logs_no_warning_and_shows_its_overhead(
    train: Run, text_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # into caplog
    words = (
        *("--dataset", text_file, "--output_dir", "out", "--num_train_epochs", "1"),
        *("--max_steps", "-1", "--logging_steps", "0.02"),
    )
    assert train(*words).exit_code == 0
    for checkpoint in sorted(Path("out").glob("checkpoint-*"))[-1:]:
        shutil.rmtree(checkpoint)
    result = train(*words, "--resume")
    assert result.exit_code == 0, result.stderr
    overhead = next(line for line in result.stdout.splitlines() if "overhead" in line)
    assert "-" not in overhead
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []


def test_an_observing_run_counts_what_it_would_have_done(train: Run, text_file: Path) -> None:
    words = (
        *("--dataset", text_file, "--output_dir", "out", "--pss_preset", "floor"),
        *("--pss_floor_reference", "noise", "--pss_floor_ratio", "100"),
    )
    result = train(*words, "--pss_check_every_steps", "2", "--pss_observe_only")
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "would have intervened" in line)
    assert " 2 " in row
    assert "would have" not in train(*words, "--overwrite").stdout


def test_a_run_without_detectors_needs_no_matrix(train: Run, text_file: Path) -> None:
    words = ("--dataset", text_file, "--max_steps", "1", "--pss_detectors", "--pss_exclude", "h")
    result = train(*words)
    assert result.exit_code == 0, result.stderr
    assert "no matrix watched (non-finite steps only)" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "mistake",
    [
        ("--dataset", "nosuch.jsonl"),
        ("--model_config", "gpt3"),
        ("--context_length", "64"),
        ("--pss_include", "*.nosuch.*"),
    ],
)
def test_overwrite_removes_nothing_before_all_is_checked(
    train: Run, text_file: Path, mistake: tuple[str, str]
) -> None:
    earlier = Path("out/checkpoint-3/trainer_state.json")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}", encoding="utf-8")
    words = ("--dataset", text_file, "--output_dir", "out", "--overwrite")
    refused = train(*words, *mistake)
    assert refused.exit_code == 2, refused.output
    assert earlier.is_file()
    assert train(*words).exit_code == 0
    assert not earlier.exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupted_run_names_the_option_that_continues_it(
    signum: int, code: int, train: Run, text_file: Path
) -> None:
    def interrupt() -> None:
        while not Path("out/checkpoint-2/trainer_state.json").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=interrupt, daemon=True).start()
    words = ("--max_steps", "100000", "--save_steps", "2", "--eval_strategy", "no")
    result = train("--dataset", text_file, "--output_dir", "out", *words)
    assert result.exit_code == code
    assert "--resume" in result.stderr


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("--save_strategy", "no"), "There is no checkpoint either"),
        (("--save_steps", "5"), "out/checkpoint-5 holds the final weights"),
    ],
)
def test_a_final_model_that_cannot_be_written_is_a_message_with_advice(
    words: tuple[str, str], advice: str, train: Run, text_file: Path
) -> None:
    Path("out/model.safetensors").mkdir(parents=True)  # stands for a full disk
    result = train("--dataset", text_file, "--output_dir", "out", "--eval_strategy", "no", *words)
    assert result.exit_code == 2, result.output
    assert "could not be written to out" in result.stderr
    assert advice in result.stderr.replace("\n", " ")


def test_after_a_failed_save_the_rest_of_the_steps_can_be_trained_again(tmp_path: Path) -> None:
    train_tiny(tmp_path, PSSConfig(), max_steps=2, save_steps=2)
    advice = advice_after_failed_save(tmp_path, 5)
    assert "checkpoint-2" in advice
    assert "--resume" in advice


def test_nonfinite_stop_has_its_own_exit_code(train: Run, text_file: Path) -> None:
    words = ("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0")
    result = train("--dataset", text_file, *words, "--pss_on_nonfinite", "stop")
    assert result.exit_code == 3
    assert "Stopped before the update of step" in result.stderr.replace("\n", " ")
    assert "No checkpoint has a finite evaluation" in result.stderr


def test_broken_run_names_the_last_healthy_checkpoint(train: Run, text_file: Path) -> None:
    words = (
        *("--dataset", text_file, "--output_dir", "out", "--eval_steps", "1", "--save_steps", "1"),
        *("--save_total_limit", "9", "--max_grad_norm", "0"),
        *("--warmup_steps", "3", "--learning_rate", "1e30"),  # from 0 to absurd within the run
    )
    for ending in ("stop", "skip"):
        result = train(*words, "--pss_on_nonfinite", ending, "--overwrite")
        assert result.exit_code == 3, result.stderr
        # The first step of a warm-up has a rate of zero.
        assert "finite is out/checkpoint-1: --resume_from_checkpoint" in result.stderr


@pytest.mark.parametrize(
    ("eval_loss", "streak", "problem"),
    [
        (3.0, 0, None),
        (None, 1, None),
        (3.0, 2, "last 2 steps were not finite"),
        (math.nan, 0, "these weights are unusable"),
        (math.inf, 2, "these weights are unusable"),
    ],
)
def test_the_summary_names_the_problem_of_a_run(
    eval_loss: float | None, streak: int, problem: str | None
) -> None:
    found = problem_of(eval_loss, streak)
    assert (problem in found) if found and problem else found == problem


def test_only_expected_warnings_are_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # into caplog
    model = nn.ModuleDict({"wte": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["wte"].weight
    logger = logging.getLogger("transformers.trainer")
    missing = "There were missing keys in the checkpoint model loaded: {}."
    with without_noise(model), caplog.at_level(logging.WARNING):
        logger.warning(missing.format(["head.weight"]))
        logger.warning(missing.format(["head.weight", "other.weight"]))
        logger.warning("mtime is something else")
    told = {record.getMessage() for record in caplog.records}
    assert told == {missing.format(["head.weight", "other.weight"]), "mtime is something else"}


def test_nonfinite_steps_are_counted(train: Run, text_file: Path) -> None:
    words = ("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0")
    result = train("--dataset", text_file, *words)
    assert result.exit_code == 3, result.stderr
    assert "these weights are unusable" in result.stderr
    assert "No checkpoint has a finite evaluation" in result.stderr
    assert "not saved" in result.stdout
    assert not Path("out/model.safetensors").exists()
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
        (("--model", "gpt2"), "You gave --model and --model_config"),
        (("--dataset", "nobody/nothing"), "the Hub gave no dataset of that name"),
        (("--dataset", "broken.jsonl"), "broken.jsonl could not be read"),
        (("--max_validation_blocks", "0"), "max_validation_blocks must be at least 1"),
        (("--output_dir", "prose.txt"), "The folder prose.txt cannot be made"),
        (("--report_to", "abacus"), "report to abacus, which is not installed or not known"),
        (("--output_dir", "prose.txt/run"), "prose.txt is in the way: it is a file"),
        (("--dataset", "prose.txt", "--pss_include", "nosuch"), "nosuch"),
        (("--resume",), "no checkpoint to resume from"),
        (("--resume_from_checkpoint", "prose.txt"), "not a complete checkpoint"),
    ],
)
def test_a_mistake_is_named_and_leaves_no_folder(
    train: Run, text_file: Path, words: tuple[str, ...], message: str
) -> None:
    Path("empty.txt").touch()
    Path("rows.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    Path("broken.jsonl").write_text('{"text": "cut', encoding="utf-8")
    before = set(Path().iterdir())
    result = train(*words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert {path.name for path in set(Path().iterdir()) - before} <= {"datasets"}  # no empty runs/


def test_a_model_that_the_hub_does_not_have(run: Run, text_file: Path) -> None:
    result = run("train", "--model", "nobody/nothing", "--dataset", text_file, *SHORT)
    assert result.exit_code == 2
    assert "There is no folder 'nobody/nothing', and the Hub gave no model" in result.stderr


def test_no_model_is_a_mistake(run: Run, text_file: Path) -> None:
    result = run("train", "--dataset", text_file, *SHORT)
    assert result.exit_code == 2
    assert "You gave no model" in result.stderr


def test_config_file_with_sizes(tmp_path: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({**sizes, "num_hidden_layers": 1}), encoding="utf-8")
    config = make_config(str(path), "num_hidden_layers=2")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 2)


def test_a_checkpoint_that_was_never_evaluated_is_named_as_unknown(tmp_path: Path) -> None:
    train_tiny(tmp_path, PSSConfig.preset("paper"), max_steps=2, save_steps=2)
    whole, cut = tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"
    cut.mkdir()
    (cut / "trainer_state.json").write_text('{"x')
    assert f"of unknown health, is {whole}" in advice_after_failure(tmp_path, None)
    assert "start the run again" in advice_after_failure(tmp_path / "elsewhere", cut)


def test_a_healthy_checkpoint_that_cannot_be_resumed_gives_its_weights(tmp_path: Path) -> None:
    train_tiny(tmp_path, PSSConfig.preset("paper"), max_steps=2, save_steps=2)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    found = json.loads(state.read_text())
    found["log_history"].append({"eval_loss": 3.0, "step": 2})
    state.write_text(json.dumps(found))
    assert "--resume_from_checkpoint continues" in advice_after_failure(tmp_path, None)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert "checkpoint-2: --model starts" in advice_after_failure(tmp_path, None)
