"""The SmolLM2 recipe on a tiny Llama: what a bad batch does to each trainer, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from scripts import load_script
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_pss.cli.app import app

script = load_script("smollm2/compare")
make_model = load_script("llm_tiny_cpu/make_model")

OPTIONS = ("--steps", "6", "--bad-step", "4")
METHODS = ("full", "lora")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("smollm2")
    make_model.main(folder / "base")
    text = folder / "text.txt"
    text.write_text(topics["typesmapping"] * 4, encoding="utf-8")
    given = ("--model", "base"), ("--output-dir", "runs"), ("--text", "text.txt")
    return [*(word for name, value in given for word in (name, str(folder / value))), *OPTIONS]


@pytest.fixture(scope="module")
def out(words: list[str]) -> Iterator[Path]:
    """Return the folder of all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "NUM_NEW_TOKENS", 4)
        patch.setattr(script, "RATES", {"full": 1e-3, "lora": 3e-3})  # for fresh weights
        script.main(words)
        yield Path(words[3])


def rows_of(out: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    lines = (out / "rows.jsonl").read_text().splitlines()
    return {tuple(row["name"]): row for row in map(json.loads, lines)}


def test_the_table_has_every_run(out: Path) -> None:
    page = (out / "report.md").read_text()
    names = [(m, b, t) for m in METHODS for b in script.BATCHES for t in script.TRAINERS]
    assert list(rows_of(out)) == [script.UNTRAINED, *names]
    for name in names:
        assert f"| {' | '.join(name)} |" in page
    assert page.count("not finite") == 2
    assert all(f"**{prompt} …**" in page for prompt in script.PROMPTS)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_labels_ruins_the_plain_run_only(out: Path, method: str) -> None:
    rows = rows_of(out)
    plain, pss = (rows[method, "no_labels", trainer] for trainer in script.TRAINERS)
    assert plain["loss"] is None
    assert pss["loss"] < rows[script.UNTRAINED]["loss"]
    assert (plain["skipped"], pss["skipped"]) == (0, 1)
    assert plain["texts"] != pss["texts"]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_random_tokens_ruins_no_run(out: Path, method: str) -> None:
    rows = rows_of(out)
    for trainer in script.TRAINERS:
        good, random = (rows[method, batch, trainer]["loss"] for batch in ("good", "random"))
        assert good != random
        assert random < rows[script.UNTRAINED]["loss"]


def test_a_second_call_repeats_no_run(
    out: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (out / "report.md").read_text()
    (out / "report.md").unlink()
    monkeypatch.delattr(script, "train")
    script.main(words)
    assert (out / "report.md").read_text() == page


def test_a_missing_run_is_repeated_with_the_same_result(
    out: Path, words: list[str], tmp_path: Path
) -> None:
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]))
    unfinished = tmp_path / "lora-no_labels" / "PSSTrainer" / "seed-0" / "pss_events.jsonl"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("{}\n{}\n")
    script.main([*words, "--output-dir", str(tmp_path)])
    name = ("lora", "no_labels", "PSSTrainer")
    found, expected = (rows_of(path)[name] for path in (tmp_path, out))
    assert found.pop("seconds") != expected.pop("seconds")
    assert found == expected


def test_other_options_need_another_folder(out: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"other options\. Give another --output-dir"):
        script.main([*words, "--seed", "1"])


def test_a_text_of_ones_own(words: list[str], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short. " * 9)
    with pytest.raises(SystemExit, match=r"has [\d,]+ tokens\. Give one of [\d,]+ or more"):
        script.main([*words, "--output-dir", str(tmp_path / "runs"), "--text", str(text)])


def test_the_built_in_loss_without_labels_has_no_gradient(words: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(words[1])
    ids = torch.arange(16).view(2, 8)
    options = {"labels": torch.full_like(ids, -100), "num_items_in_batch": torch.tensor(0)}
    loss = model(input_ids=ids, **options).loss
    loss.backward()
    assert loss.isnan()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())
    own = script.mean_over_labels(model(input_ids=ids), options["labels"])
    own.backward()
    assert any(bool(p.grad.isnan().any()) for p in model.parameters())


@pytest.mark.parametrize(
    "command",
    [
        "report full-no_labels",
        "rescue full-no_labels/PSSTrainer/seed-0 --html spike.html",
        "watch full-no_labels/PSSTrainer/seed-0 --once",
    ],
)
def test_the_commands_of_the_card_read_a_run(
    out: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    ran = CliRunner().invoke(app, command.split())
    has_no_checkpoint = command.startswith("rescue")
    assert ran.exit_code == has_no_checkpoint, ran.output
    assert "Traceback" not in ran.output
    texts = {
        "report": ("full-no_labels/report.html", "PSSTrainer ended finite in one seed"),
        "rescue": ("spike.html", "Rows of the data set: 6, 7"),
    }
    if command.split()[0] in texts:
        page, text = texts[command.split()[0]]
        assert text in Path(page).read_text(encoding="utf-8")
