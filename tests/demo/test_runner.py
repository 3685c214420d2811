"""The demo's twins: they finish, they fail loudly, and Ctrl-C leaves results and no process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hf_pss.demo.recipe import DemoRecipe
from hf_pss.demo.runner import run_demo
from hf_pss.errors import ConfigurationError
from hf_pss.report.html import write_report
from hf_pss.report.table import render_table

TINY = DemoRecipe(
    num_layers=1,
    width=16,
    num_heads=2,
    context_length=16,
    batch_size=4,
    num_steps=6,
    eval_every_steps=3,
    num_eval_blocks=8,
    health_every_steps=2,
)


def _read_lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO())
    assert run_demo(TINY, out, guards=("plain", "paper"), console=console) == "finished"
    return out


def test_writes_what_the_report_reads(finished: Path) -> None:
    info = json.loads((finished / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["guards"] == ["plain", "paper"]
    for guard in info["guards"]:
        folder = finished / guard / "seed-0"
        rows = _read_lines(folder / "metrics.jsonl")
        assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in rows if "eval_loss" in r] == [3, 6]
        health = _read_lines(folder / "pss_health.jsonl")
        assert [r["step"] for r in health] == [0, 2, 4, 6]
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == "finished"
        assert summary["num_steps"] == 6
        assert 0 < summary["pss_seconds"] < summary["train_seconds"]


def test_twins_are_twins(finished: Path) -> None:
    """Without an intervention the guards give the same losses, bit for bit."""
    plain, paper = (
        _read_lines(finished / guard / "seed-0" / "metrics.jsonl") for guard in ("plain", "paper")
    )
    assert [r.get("loss", r.get("eval_loss")) for r in plain] == [
        r.get("loss", r.get("eval_loss")) for r in paper
    ]


def test_the_report_renders(finished: Path) -> None:
    page = write_report(finished)
    assert "<html" in page.read_text()
    assert render_table(finished).row_count > 0


def test_the_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = [p.clone() for p in TINY.model().parameters()]
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, TINY.model().parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"guards": ("plain", "magic")}, "magic"),
        ({"guards": ()}, "none"),
        ({"num_seeds": 0}, "seeds"),
    ],
)
def test_refuses(options: dict[str, object], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=word):
        run_demo(TINY, tmp_path, **options)


def test_a_failing_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The child reads the recipe from run.json; a directory in the way of its metrics ends it.
    (tmp_path / "plain" / "seed-0" / "pss_events.jsonl").mkdir(parents=True)
    shown = io.StringIO()
    status = run_demo(TINY, tmp_path, guards=("plain",), console=Console(file=shown, width=200))
    assert status == "failed"
    assert "train.log ends with" in shown.getvalue()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def _processes_of(out: Path) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [x for x in listed.stdout.splitlines() if str(out) in x and "hf_pss.demo.worker" in x]
    return [int(line.split()[0]) for line in lines]


def _wait_for(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_orphan(how: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from tests.demo.test_runner import TINY; from hf_pss.demo.runner import run_demo\n"
        f"print(run_demo(replace(TINY, num_steps=100_000), Path({str(tmp_path)!r}),"
        " guards=('plain',)))"
    )
    root = Path(__file__).parents[2]
    demo = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "plain" / "seed-0" / "metrics.jsonl"
    try:
        assert _wait_for(lambda: metrics.exists() and metrics.stat().st_size > 4000, 90)
        demo.send_signal(how)
        said, _ = demo.communicate(timeout=20)
    finally:
        demo.kill()
    # Even a killed demo leaves none: a run ends itself when its parent is gone.
    assert _wait_for(lambda: not _processes_of(tmp_path), 15)
    if how is not signal.SIGKILL:
        assert said.strip().endswith("interrupted")
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    page = write_report(tmp_path).read_text()
    assert "<html" in page
