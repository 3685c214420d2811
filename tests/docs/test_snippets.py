"""Every Python snippet of the README and the docs runs, and every command in them is understood."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from helpers import gpt2, token_rows
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer

from hf_pss import PSSTrainingArguments
from hf_pss.cli.app import app
from hf_pss.cli.parsing import parse_plan
from hf_pss.detection.policy import Action
from hf_pss.evidence.grid import read_grid
from hf_pss.records.events import Event, EventKind, HealthReading

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(python|bash|yaml)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

# The snippets of frameworks run in `make test-frameworks`.
OPTIONAL = ("trl", "lightning", "llamafactory", "swift")

# Commands that no test reads, each with the reason. All others are checked by `check`.
NOT_CHECKED = {
    "source .venv/bin/activate": "it changes the shell",
    ".venv/bin/pre-commit install": "it changes the clone's git hooks",
}


def blocks_of(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        re.sub(rf"^{indent}", "", code, flags=re.M)
        for indent, kind, code in found
        if kind == language
    ]


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page, each on one line, without its comment."""
    text = "".join(blocks_of(page, "bash")).replace("\\\n", " ")
    lines = (re.split(r"(?:^|\s)#\s", line)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


# ---- snippets ----

WITH_SNIPPETS = [page for page in PAGES if blocks_of(page, "python")]


def names_for(folder: Path) -> dict[str, Any]:
    """Return what the snippets take as given: a tiny model, its data and a trainer."""
    letters = {token: i for i, token in enumerate(["<eos>", *"abcdefghijklmnopqrstuvwxyz "])}
    args = PSSTrainingArguments(str(folder), max_steps=1, use_cpu=True)
    model, dataset = gpt2(), token_rows(8)
    optimizer = torch.optim.AdamW(model.parameters())

    class SFTTrainer(Trainer):
        """Takes ``...`` as a snippet writes it. tests/recipes runs trl's own trainers."""

        def __init__(self, *_: object, **options: Any) -> None:
            super().__init__(model=gpt2(), args=args, train_dataset=dataset, **options)

    def loss_of_a_batch() -> float:
        with torch.no_grad():
            return float(model(**batch).loss)

    batch = {name: row[None] for name, row in dataset[0].items()}
    loss = model(**batch).loss
    loss.backward()
    return {
        **{"torch": torch, "args": args, "model": model, "dataset": dataset, "loss": loss},
        **{"batch": batch, "pairs_of_batches": [(batch, batch)]},
        **{"optimizer": optimizer, "loss_of_a_batch": loss_of_a_batch, "SFTTrainer": SFTTrainer},
        "Trainer": SFTTrainer,
        "trainer": SFTTrainer(),
        "texts": Dataset.from_dict({"text": ["a b c", "d e f"]}),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(letters, [])),
            eos_token="<eos>",
            pad_token="<eos>",
        ),
        "masking": list,
        "reading": HealthReading(1),
        "record": Event(
            step=1,
            kind=EventKind.SPIKE,
            detector="grad_norm_ratio",
            decision=Action.OBSERVE,
            reason="budget",
        ),
    }


@pytest.mark.filterwarnings("default")  # as a user runs them
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_for(tmp_path / "given")
    for code in blocks_of(page, "python"):
        for package in OPTIONAL:
            if re.search(rf"^(from|import) {package}\b", code, re.MULTILINE):
                pytest.importorskip(package)
        exec(compile(code, f"{page.name}: {code}", "exec"), names)


GRIDS = blocks_of(ROOT / "docs" / "papers.md", "yaml")


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_of_the_paper_index_can_be_read(grid: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(grid, encoding="utf-8")
    assert len(read_grid(path)) >= 3


# ---- commands ----


def check(command: str) -> None:
    """Check a command as far as that works without running it.

    Raises:
        Exception: The program would refuse it, or a file that it names does not exist.
    """
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    program, *rest = words
    for word in rest:
        if re.match(r"(recipes|tests)/", word):
            assert (ROOT / word).exists(), word
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), command
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = {*project["optional-dependencies"]}
        extras = re.findall(r"\[([\w,]+)\]", command)
        assert rest[0] == "install"
        assert {e for one in extras for e in one.split(",")} <= known, command
    elif "hf-pss" in words or "hf_pss.cli" in words:
        place = next(i for i, word in enumerate(words) if word in ("hf-pss", "hf_pss.cli"))
        check_own(words[place + 1], [word for word in words[place + 2 :] if word != "..."])
    else:
        assert program in ("python", "pytest", "accelerate"), command
        place = next((i for i, word in enumerate(words) if word.endswith("finetune_llm.py")), None)
        if place is not None:
            runpy.run_path(words[place])["parse"]([*words[place + 1 :], "--use_cpu"])


def check_own(name: str, words: list[str]) -> None:
    """Let a command of hf-pss read its options."""
    if name == "train":
        given = {"--model", "--model_config", "--model_size", "--config"} & {*words}
        model = [] if given else ["--model_config", "gpt2"]
        parse_plan([*words, *model, "--use_cpu"])
    else:
        typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]


COMMANDS = [
    pytest.param(command, id=f"{page.stem}: {command}"[:80])
    for page in PAGES
    for command in commands_of(page)
    if command not in NOT_CHECKED
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check(command)


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("make tset", "tset"),
        ("pip install '.[repotr]'", "repotr"),
        ("python recipes/no_such_script.py", "no_such_script"),
        ("hf-pss train --model_config gpt2 --pss_presett floor", "pss_presett"),
        ("python recipes/finetune_llm.py --model_name_or_path a --dataset b --lora_rang 8", "rang"),
        ("hf-pss watch runs/notes --onec", "No such option: --onec"),
        ("rm -r runs", "rm -r"),
    ],
)
def test_a_command_with_a_mistake_is_refused(
    command: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(Exception, match=mistake):
        check(command)


@pytest.mark.slow
def test_the_commands_of_the_first_page_run(tmp_path: Path) -> None:
    commands = [c for c in commands_of(ROOT / "docs" / "index.md") if c.startswith("hf-pss")]
    assert len(commands) == 3
    for command in commands:
        ran = subprocess.run(
            [sys.executable, "-m", "hf_pss.cli", *shlex.split(command)[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr


def test_the_commands_that_are_not_checked_are_in_the_docs() -> None:
    found = {command for page in PAGES for command in commands_of(page)}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [c for c in NOT_CHECKED if c not in found and c not in text] == []
