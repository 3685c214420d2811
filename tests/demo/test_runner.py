"""The demo's twins: they finish, they fail loudly, and Ctrl-C leaves results and no process."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import Process, children_of, is_running, start, wait_until
from rich.console import Console
from small_library import corpus_cache, small_library, use_small_library

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.baselines import TRAINERS_OWN
from hf_pss.evidence.demo import run_demo
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.recipes import Recipe
from hf_pss.evidence.report_page import write_report
from hf_pss.evidence.report_results import render_table
from hf_pss.evidence.runner import num_cores
from hf_pss.evidence.worker import train_cell
from hf_pss.runs.signals import signals_interrupt

TINY = Recipe(
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


ENDLESS = replace(TINY, num_steps=100_000)
PROGRAM = Path(__file__).with_name("demo_process.py")


@pytest.fixture(autouse=True)
def _corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_library(monkeypatch)


def start_demo(recipe: Recipe, out: Path, *real: str, **options: Any) -> Process:
    environment = {**os.environ, "HF_PSS_CACHE": str(corpus_cache()), "COLUMNS": "200"}
    words = (out, small_library(), json.dumps(asdict(recipe)), json.dumps(options))
    return start(PROGRAM, *words, *real, env=environment)


def _read_lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    with start_demo(TINY, out, guards=("plain", "paper")) as demo:
        printed, errors = demo.communicate()
    assert printed.endswith("finished"), errors
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
    ],
)
def test_refuses(options: dict[str, object], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=word):
        run_demo(TINY, tmp_path, **options)


def test_a_failing_run_says_why(tmp_path: Path) -> None:
    recipe = replace(TINY, adam_beta2=2.0)  # AdamW refuses it
    with start_demo(recipe, tmp_path, guards=("plain",)) as demo:
        shown, errors = demo.communicate()
    assert shown.endswith("failed"), errors
    assert "train.log ends with" in shown
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_nothing_of_an_earlier_demo_is_left(tmp_path: Path) -> None:
    for folder in ("plain/seed-0", "plain/seed-3", "paper/seed-0", "other/seed-0", "plain/seed-x"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("metrics.jsonl", "summary.json", "pss_events.jsonl", "pss_health.jsonl"):
            (tmp_path / folder / name).write_text("{}\n")
    (tmp_path / "report.html").touch()
    (tmp_path / "paper" / "seed-0" / "notes.txt").touch()
    recipe = replace(TINY, adam_beta2=2.0)  # fails before it has written anything
    with start_demo(recipe, tmp_path, guards=("plain",)) as demo:
        shown, errors = demo.communicate()
    assert shown.endswith("failed"), errors
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert {x for x in left if not x.startswith(("other/", "plain/seed-x"))} == {
        "run.json",
        "plain/seed-0/metrics.jsonl",
        "plain/seed-0/train.log",
        "paper/seed-0/notes.txt",
    }
    assert (tmp_path / "plain" / "seed-0" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "plain" / "seed-3").exists()
    assert (tmp_path / "other" / "seed-0" / "metrics.jsonl").exists()
    assert (tmp_path / "plain" / "seed-x" / "metrics.jsonl").exists()


def test_what_cannot_be_removed_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "plain" / "seed-0" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"cannot be removed: .*metrics\.jsonl"):
        run_demo(TINY, tmp_path, guards=("plain",), console=Console(file=io.StringIO()))
    assert not (tmp_path / "run.json").exists()


def test_a_step_that_is_not_finite_is_null_and_not_zero(tmp_path: Path) -> None:
    """The Trainer's filter logs a loss of NaN as 0.0, which would pass for the best of all."""
    cell = Cell(
        recipe_name="slow_damage",
        recipe=replace(TINY, learning_rate=1e30),
        optimizer=TRAINERS_OWN,
        guard_name="plain",
        pss=PSSConfig(observe_only=True),
        seed=0,
    )
    row = train_cell(cell, tmp_path)
    lines = [r for r in _read_lines(tmp_path / "metrics.jsonl") if "loss" in r]
    losses = [line["loss"] for line in lines]
    num_bad = losses.count(None)
    assert 0 < num_bad < len(losses)
    assert 0.0 not in losses
    assert lines[-1]["nonfinite_steps"] == num_bad
    assert row.losses.count(None) == num_bad


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the cores of a process")
def test_only_cores_that_it_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_demo_leaves_no_orphan(how: signal.Signals, tmp_path: Path) -> None:
    metrics = tmp_path / "plain" / "seed-0" / "metrics.jsonl"
    with start_demo(ENDLESS, tmp_path, guards=("plain",)) as demo:
        wait_until(
            lambda: demo.poll() is not None or (metrics.exists() and metrics.stat().st_size > 4000),
            "the run did not begin",
        )
        assert demo.poll() is None, demo.errors
        runs = children_of(demo.pid)
        assert len(runs) == 1
        demo.send_signal(how)
        said, _ = demo.communicate()
        # Even a killed demo leaves none: a run ends itself when its parent is gone.
        wait_until(lambda: not any(map(is_running, runs)), "a run outlived its demo")
    if how is not signal.SIGKILL:
        assert said.endswith("interrupted")
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    page = write_report(tmp_path).read_text()
    assert "<html" in page


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_demo_killed_as_its_run_starts_leaves_no_orphan(tmp_path: Path) -> None:
    """A run that is still importing has not asked yet who its parent is."""
    with start_demo(ENDLESS, tmp_path, "real", guards=("plain",)) as demo:
        wait_until(lambda: bool(children_of(demo.pid)), "the run did not begin")
        runs = children_of(demo.pid)
        demo.kill()
        demo.wait()
        wait_until(lambda: not any(map(is_running, runs)), "a run outlived its demo")
    assert not (tmp_path / "plain" / "seed-0" / "metrics.jsonl").exists()
