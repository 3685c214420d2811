"""The pages of docs/frameworks, and what their commands train: a tiny model and a few rows."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# One of them fires in the six steps of a quick start.
OPTIONS = {
    "pss_threshold_ratio": 1.0001,
    "pss_calibration_steps": 1,
    "pss_floor_ratio": 1.3,
    "pss_check_every_steps": 1,
}


def snippets_of(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return BLOCK.findall((ROOT / "docs" / "frameworks" / f"{page}.md").read_text("utf-8"))


def needs_framework(package: str) -> None:
    """Skip a test without the framework. In `make test-frameworks` its absence is an error."""
    if "HF_PSS_NEEDS_FRAMEWORK" in os.environ:
        importlib.import_module(package)
    else:
        pytest.importorskip(package)


def make_model_and_rows(folder: Path) -> None:
    """Write the model of recipes/llm_tiny_cpu into ``model``, and rows.jsonl and rows.json."""
    make = runpy.run_path(str(ROOT / "recipes" / "llm_tiny_cpu" / "make_model.py"))["main"]
    make(folder / "model")
    answers = [(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(64)]
    rows = [{"instruction": one, "input": "", "output": other} for one, other in answers]
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    roles = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in answers
    ]
    for name, lines in (("rows", rows), ("chats", roles)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")


def run(folder: Path, *words: str, **variables: str) -> str:
    """Run ``python *words`` in a folder, and return everything that it has written."""
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return ran.stdout


def as_words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
