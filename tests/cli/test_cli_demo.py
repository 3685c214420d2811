from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import Run
from preloaded import PATIENCE_SECONDS


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the folder of a demo that was interrupted: one guard, two steps."""
    folder = tmp_path / "demo" / "plain" / "seed-0"
    folder.mkdir(parents=True)
    rows = ({"step": step, "loss": 7.0 - step, "grad_norm_preclip": 1.0} for step in range(2))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    info = {"version": 1, "status": "interrupted", "guards": ["plain", "paper"], "seeds": [0]}
    (tmp_path / "demo" / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return tmp_path / "demo"


def test_report_ends_with_the_path_of_the_page(run: Run, run_dir: Path) -> None:
    result = run("report", run_dir)
    assert result.exit_code == 0, result.output
    assert "plain" in result.stdout
    assert Path(result.stdout.splitlines()[-1]) == run_dir / "report.html"
    assert (run_dir / "report.html").is_file()


def test_report_is_written_to_the_given_path(run: Run, run_dir: Path, tmp_path: Path) -> None:
    assert run("report", run_dir, "--output", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").is_file()
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run.json", "run.json does not end in .html"),
        ("plain/seed-0/metrics.jsonl", "does not end in .html"),
        ("pipe.html", "is not a regular file"),
        ("run.json/page.html", "cannot be written"),
    ],
)
def test_report_overwrites_nothing_but_a_page(
    output: str, message: str, run: Run, run_dir: Path
) -> None:
    os.mkfifo(run_dir / "pipe.html")
    before = (run_dir / "run.json").read_text()
    result = run("report", run_dir, "--output", run_dir / output)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert (run_dir / "run.json").read_text() == before
    assert not (run_dir / "figures").exists()


@pytest.mark.parametrize("name", ["report.html", "figures/loss.png", "figures"])
def test_report_says_what_stands_where_it_writes(name: str, run: Run, run_dir: Path) -> None:
    if name == "figures":
        (run_dir / name).touch()
    else:
        (run_dir / name).mkdir(parents=True)
    result = run("report", run_dir)
    assert result.exit_code == 2, result.output
    assert "--output" in result.stderr


def test_report_needs_a_folder_of_a_demo(run: Run, tmp_path: Path) -> None:
    missing = run("report", "nowhere")
    assert missing.exit_code == 2
    assert "There is no folder nowhere" in missing.stderr
    empty = run("report", tmp_path)
    assert empty.exit_code == 2
    assert "holds no run" in empty.stderr


@pytest.mark.parametrize("words", [["report", "."], ["demo"]])
def test_a_missing_extra_is_reported_before_training(words: list[str]) -> None:
    program = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"  # as if it were not installed
        "from hf_pss.cli.app import app\n"
        f"app({words!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install matplotlib jinja2" in done.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--guards", "plain,prayer"), "You asked for the guards plain, prayer"),
        (("--guards", ","), "You asked for the guards none"),
        (("--learning-rate", "-1"), "learning_rate must be above 0"),
        (("--seeds", "0"), "--seeds"),
        (("--output-dir", "photos"), "holds files, but no earlier demo"),
        (("--output-dir", "photos/cat.txt"), "is a file"),
    ],
)
def test_demo_refuses_mistaken_options(run: Run, words: tuple[str, ...], message: str) -> None:
    Path("photos").mkdir()
    Path("photos/cat.txt").touch()
    result = run("demo", *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_help_explains_the_plain_twin(run: Run) -> None:
    words = " ".join(run("demo", "--help").output.split())
    assert "bit for bit those of the plain Trainer" in words
    assert "--learning-rate 1e-2" not in words


@pytest.mark.slow
def test_demo_trains_and_reports(run: Run) -> None:
    words = ("--steps", "3", "--guards", "plain,floor", "--output-dir", "out")
    for _ in range(2):  # the second replaces the first without being asked
        result = run("demo", *words)
        assert result.exit_code == 0, result.output
        assert Path(result.stdout.splitlines()[-1]).is_file()
        assert "floor" in result.stdout


@pytest.mark.slow
def test_an_interrupted_demo_reports_its_runs_so_far(tmp_path: Path) -> None:
    program = "from hf_pss.cli.app import main; main()"
    words = ("demo", "--steps", "100000", "--guards", "plain", "--output-dir", "out")
    demo = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / "out" / "plain" / "seed-0" / "metrics.jsonl"
        while demo.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.1)
        demo.send_signal(signal.SIGINT)
        printed, complaints = demo.communicate(timeout=PATIENCE_SECONDS)
    finally:
        demo.kill()
    assert demo.returncode == 130, complaints
    assert "not finished" in printed
    assert Path(printed.splitlines()[-1]).is_file()


def test_the_report_of_a_run_of_ones_own_leads_to_its_commands(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "own" / "pss_events.jsonl").touch()
    result = run("report", tmp_path / "own")
    assert result.exit_code == 2
    text = " ".join(result.stderr.split())
    assert "or after a spike that PSS saw: hf-pss rescue RUN --html FILE.html." in text
