"""Every script of recipes/examples runs as it is, and PSS watches its model."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import RECIPES

from hf_pss import PSSCallback

EXAMPLES = sorted((RECIPES / "examples").glob("*.py"))
NEEDS = {"sft_lora": ("trl", "peft"), "dpo": ("trl",), "grpo": ("trl",)}
MOST_LINES = 40

pytestmark = pytest.mark.filterwarnings("default")  # as a user runs them


def num_steps(names: dict[str, Any]) -> int:
    """Return how many steps PSS has seen in an example."""
    if "pss" in names:
        return int(names["pss"].step_number)
    controller = PSSCallback.of(names["trainer"]).controller
    assert controller is not None
    assert controller.selection.matrices or controller.selection.adapters
    assert controller.step_number == names["trainer"].args.max_steps
    return int(controller.step_number)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path), run_name="__main__")
    assert num_steps(names) > 0
    if "trainer" in names:
        losses = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
        assert all(map(math.isfinite, losses))


def test_there_are_ten_short_examples() -> None:
    lengths = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert len(lengths) == 10
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.slow
def test_the_accelerate_example_runs_on_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    ran = subprocess.run(
        [*command, str(RECIPES / "examples" / "accelerate_ddp.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
