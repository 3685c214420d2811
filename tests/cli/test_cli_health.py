from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Run
from safetensors.torch import save_file


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
    assert "No matrix of" in result.stderr
    assert run("health", checkpoint, "--compare", lost).exit_code == 2
    machine = run("health", lost, "--json")
    assert machine.exit_code == 2
    assert len(json.loads(machine.stdout)["matrices"]) == 2


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
    assert "Compared, what moved most first" in result.stdout
    assert result.stdout.splitlines()[-1] == str(page)
    assert "Spectral health" in page.read_text(encoding="utf-8")


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
def test_no_regular_file_is_exit_code_2(
    run: Run, checkpoint: Path, make: Callable[[Path], None]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    make(checkpoint / "model.safetensors")
    result = run("health", checkpoint)
    assert result.exit_code == 2
    assert "no regular file" in result.stderr


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


def test_help_teaches(run: Run) -> None:
    text = " ".join(run("health", "--help").output.split())
    for words in (
        "--compare",
        "--exact",
        "--json",
        "--html",
        "Exit codes",
        "Examples",
        "pickle",
        "[report]",
    ):
        assert words in text
