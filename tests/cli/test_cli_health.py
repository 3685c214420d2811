from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Run
from safetensors.torch import save_file
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_pss.runs.folder import SUPERSEDED


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tensors = {f"h.{i}.w.weight": torch.randn(70, 80) for i in range(5)}
    save_file(tensors | {"ln.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.safetensors"
    filled = torch.full((70, 80), math.nan)
    save_file({"h.0.w.weight": filled, "h.1.w.weight": torch.randn(70, 80)}, path)
    return path


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    path = tmp_path / "lost.safetensors"
    filled = {f"h.{i}.w.weight": torch.full((70, 80), math.nan) for i in range(2)}
    save_file(filled | {"ln.weight": torch.full((4,), math.inf)}, path)
    return path


def test_healthy(run: Run, checkpoint: Path) -> None:
    result = run("health", checkpoint)
    assert result.exit_code == 0, result.output
    assert "5 matrices in 6 tensors" in " ".join(result.stdout.split())
    assert "Every number that was read is finite" in result.stdout


def test_not_finite_is_exit_code_1(run: Run, broken: Path, checkpoint: Path) -> None:
    result = run("health", broken)
    assert result.exit_code == 1
    assert "NOT FINITE" in result.stdout
    assert "5,600 of 5,600 numbers are NaN or inf" in " ".join(result.stdout.split())
    assert run("health", checkpoint, "--compare", broken).exit_code == 1
    assert run("health", broken, "--json").exit_code == 1


def test_nothing_finite_is_exit_code_2(run: Run, lost: Path, checkpoint: Path) -> None:
    result = run("health", lost)
    assert result.exit_code == 2
    assert "5,600 of 5,600 numbers are NaN or inf" in " ".join(result.stdout.split())
    assert "No number of" in result.stderr
    assert run("health", checkpoint, "--compare", lost).exit_code == 2
    machine = run("health", lost, "--json")
    assert machine.exit_code == 2
    assert len(json.loads(machine.stdout)["matrices"]) == 2


@pytest.mark.parametrize("name", ["h.0.w.lora_A.weight", "ln.weight"])
def test_nothing_finite_outside_of_matrices(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: torch.full((4, 4), math.nan)[: 1 if name == "ln.weight" else 4]}, path)
    assert run("health", path).exit_code == 2
    save_file({name: torch.full((4, 4), math.nan), "b": torch.ones(1)}, path)
    assert run("health", path).exit_code == 1


@pytest.mark.parametrize("exact", [True, False])
def test_json_alone_is_on_stdout(run: Run, checkpoint: Path, exact: bool) -> None:
    result = run("health", checkpoint, "--json", *(["--exact"] if exact else []))
    data = json.loads(result.stdout)
    assert data["method"] == ("exact" if exact else "quick")
    assert len(data["matrices"]) == 5


def test_compare_and_page(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "health.html"
    result = run("health", checkpoint, "--compare", checkpoint, "--html", page)
    assert result.exit_code == 0, result.output
    assert "Changes, the largest first" in result.stdout
    assert result.stdout.splitlines()[-1] == str(page)
    assert "Spectral health" in page.read_text(encoding="utf-8")


def test_without_matplotlib_the_table_is_printed_before_the_error(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hf_pss.view.canvas", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("health", checkpoint, "--html", "health.html")
    assert result.exit_code == 2
    assert "Every number that was read is finite" in result.stdout
    assert "pip install matplotlib jinja2" in result.stderr
    assert not Path("health.html").exists()


def test_a_series_over_steps(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    noise = torch.randn(70, 80)
    for step, scale in ((5, 1.0), (10, 2.0), (20, 4.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        tensors = {"h.0.w.weight": scale * noise}
        save_file(tensors, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    others = ("--compare", "checkpoint-10", "--compare", "checkpoint-20")
    result = run("health", "checkpoint-5", *others, "--html", "page.html")
    assert result.exit_code == 0, result.output
    first = [line.split()[0] for line in result.stdout.splitlines()[1:5]]
    assert first == ["checkpoint", "checkpoint-5", "checkpoint-10", "checkpoint-20"]
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Over 3 checkpoints" in page
    assert 'alt="Stable ranks and σ₁ over the checkpoints"' in page
    data = json.loads(run("health", "checkpoint-5", *others, "--json").stdout)
    assert [row["step"] for row in data["series"]] == [5, 10, 20]
    tops = [row["largest_sigma1"] for row in data["series"]]
    assert tops == pytest.approx([tops[0], 2 * tops[0], 4 * tops[0]])
    assert data["changes"][0]["relative_change"] == pytest.approx(3)
    save_file({"h.0.w.weight": noise * math.nan}, "checkpoint-10/model.safetensors")
    assert run("health", "checkpoint-5", *others).exit_code == 2  # nothing of it is finite


def damage(path: Path) -> dict[str, bytes]:
    good = path.read_bytes()
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    twice = header[:-1] + b"," + header[1:]
    return {
        "truncated": good[:-100],
        "oversize header": (2**40).to_bytes(8, "little") + good[8:],
        "duplicate key": len(twice).to_bytes(8, "little") + twice,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", ["truncated", "oversize header", "duplicate key", "empty"])
def test_damage_is_exit_code_2(run: Run, checkpoint: Path, kind: str) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path)[kind])
    result = run("health", checkpoint)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_traversing_index_is_exit_code_2(run: Run, checkpoint: Path) -> None:
    index = checkpoint.parent / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    result = run("health", index)
    assert result.exit_code == 2
    assert "It is not opened" in result.stderr


def test_pickles_and_nothing_are_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only .safetensors files are opened" in run("health", tmp_path / "old").stderr
    for words in (("old",), ("nowhere",), ("old", "--html", tmp_path)):
        assert run("health", *words).exit_code == 2


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_file_that_is_not_regular_is_exit_code_2(
    run: Run, checkpoint: Path, make: Callable[[Path], None]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    make(checkpoint / "model.safetensors")
    result = run("health", checkpoint)
    assert result.exit_code == 2
    assert "not a regular file" in result.stderr


def test_links_in_a_circle_are_exit_code_2(run: Run, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("model.safetensors")
    result = run("health", checkpoint)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_page_that_cannot_be_written(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("health", checkpoint, "--html", tmp_path / "file" / "page.html")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert "Every number that was read is finite" in result.stdout  # the work is not lost


def test_a_page_replaces_no_file_of_another_kind(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """A shell may expand ``--html *.safetensors``; the path may also be a device."""
    shard = checkpoint / "model.safetensors"
    before = shard.read_bytes()
    result = run("health", "--html", shard, shard)
    assert result.exit_code == 2
    assert "does not end in .html" in result.stderr
    assert shard.read_bytes() == before
    os.mkfifo(tmp_path / "page.html")
    result = run("health", checkpoint, "--html", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "not a regular file" in result.stderr
    assert (tmp_path / "page.html").is_fifo()


@pytest.mark.parametrize("error", [None, MemoryError(), LinAlgError("it did not converge")])
@pytest.mark.parametrize("when", ["matrix_survey.compare", "health_page.render_page"])
def test_a_failure_while_reading_is_exit_code_2(
    run: Run,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    error: Exception | None,
) -> None:
    """Exit code 1 means that numbers are not finite, so a vanished file must not give it."""
    module, name = when.split(".")
    real = getattr(importlib.import_module(f"hf_pss.inspection.{module}"), name)

    def late(*args: Any, **options: Any) -> Any:
        if error is not None:
            raise error
        (checkpoint / "model.safetensors").unlink()
        return real(*args, **options)

    monkeypatch.setattr(f"hf_pss.inspection.{when}", late)
    page = checkpoint / "page.html"
    result = run("health", checkpoint, "--compare", checkpoint, "--html", page)
    assert result.exit_code == 2, result.output
    assert ("cannot be read" if error is None else "could not be measured") in result.stderr
    assert "cannot be written" not in result.stderr
    assert not page.exists()


def test_help_shows_options_and_examples(run: Run) -> None:
    text = " ".join(run("health", "--help").output.split())
    for words in (
        "--compare",
        "--exact",
        "--json",
        "--html",
        "Exit codes",
        "Examples",
        "pickle",
        "jinja2",
    ):
        assert words in text


def test_a_runs_folder_stands_for_its_newest_complete_checkpoint(
    run: Run, train: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "notes"
    assert (
        train("--output_dir", folder, "--save_strategy", "steps", "--save_steps", 2).exit_code == 0
    )
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "checkpoint-10").mkdir()  # newer, and incomplete
    earlier = shutil.copytree(folder / "checkpoint-5", folder / "checkpoint-8")
    (earlier / SUPERSEDED).touch()  # newer, and of an earlier run
    result = run("health", folder)
    assert result.exit_code == 0, result.output
    assert f"newest complete checkpoint of this run: {folder / 'checkpoint-5'}" in result.stderr
    assert result.stdout == run("health", folder / "checkpoint-5").stdout
    shutil.copy(folder / "checkpoint-5" / "model.safetensors", folder)
    result = run("health", folder)
    assert f"The weights in {folder} itself." in result.stderr
