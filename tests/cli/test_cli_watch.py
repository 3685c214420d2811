from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import Run
from preloaded import PATIENCE_SECONDS

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.records.events import Event, Intervention, MatrixChange, to_json_line
from hf_pss.runs.records_files import health_line

EVIL = "h.0\x1b[2J[red].weight"
PROGRAM = [sys.executable, "-c", "from hf_pss.cli.app import main; main()"]


def intervention(step: int) -> Intervention:
    drop = Judgement(Verdict.SPIKE, "stable_rank_drop", (EVIL,), 2.0, 8.0, 4.0)
    event = Event.of(drop, Decision(Action.ACT, "stable_rank_drop"), step=step, loss=4.0)
    return Intervention(
        event=event,
        smoothing="clip",
        seconds=0.1,
        matrices=(MatrixChange(EVIL, (4, 4), "smoothed"),),
    )


@pytest.fixture
def live(tmp_path: Path) -> Path:
    folder = tmp_path / "live"
    folder.mkdir()
    events, health = folder / "pss_events.jsonl", folder / "pss_health.jsonl"
    events.write_text(to_json_line(intervention(7)) + "\n" + '{"cut": ')
    ranks = {f"h.{i}.w.weight": 5.0 + i for i in range(12)}
    lines = [health_line(0, {**ranks, EVIL: 8.0}), health_line(10, {**ranks, EVIL: 1.25})]
    health.write_text("".join(f"{line}\n" for line in lines))
    return folder


def end(folder: Path, *, max_steps: int = 10) -> None:
    logs = {"step": 10, "loss": 3.25, "pss/grad_norm_preclip": 0.5, "learning_rate": 1e-3}
    state = {"global_step": 10, "max_steps": max_steps, "log_history": [logs]}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_once(run: Run, live: Path) -> None:
    end(live, max_steps=100)
    result = run("watch", live, "--once")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "step 10 of 100 loss 3.25 gradient norm 0.5 learning rate 0.001" in text
    assert "(trainer_state.json)" in text
    assert "1 event, 1 intervention:" in text
    assert "Step 7: stable rank drop 2, 0.25 × its average of 8" in text
    assert "smoothing (clip) changed 1 of 1 matrix" in text
    assert "keep falling, lower the learning rate" in text  # the advice
    worst = text.index("h.0\\x1b[2J[red] 1.25 8")
    assert worst < text.index("h.0.w 5")
    assert "5 more; --lines shows them." in text
    assert "\x1b" not in result.stdout


def test_the_advice_of_many_spikes_does_not_hide_behind_the_newest_event(
    run: Run, live: Path
) -> None:
    floor = Judgement(Verdict.SPIKE, "stable_rank_floor", ("w",), 2.0, None, 4.0)
    event = Event.of(floor, Decision(Action.ACT, "stable_rank_floor"), step=12, loss=4.0)
    records = [*map(intervention, range(3, 8)), *[replace(intervention(12), event=event)] * 7]
    lines = "".join(f"{to_json_line(record)}\n" for record in records)
    (live / "pss_events.jsonl").write_text(lines)
    text = " ".join(run("watch", live, "--once").stdout.split())
    assert "routine" not in text
    assert "Step 7: Look at the stable ranks" in text
    assert "call hf-pss rescue" in text


def test_lines_bounds_the_matrices(run: Run, live: Path) -> None:
    assert "10 more" in run("watch", live, "--once", "--lines", 3).stdout


def test_unreadable_readings_are_not_reported_as_missing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pss_health.jsonl").write_text('{"step": \n')
    text = run("watch", tmp_path, "--once").stdout
    assert "No stable ranks: none could be read." in text
    assert "1 line or state of the files could not be read." in text


def test_watch_exits_when_the_run_has_ended(run: Run, live: Path) -> None:
    end(live)
    result = run("watch", live)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("step 10 of 10: loss 3.25")
    assert lines[1].startswith("WARN: Step 7: stable rank drop 2")
    assert lines[2] == "step 10: lowest stable rank 1.25, h.0\\x1b[2J[red].weight"
    assert lines[-1] == "The run has ended."
    assert "\x1b" not in result.stdout


def test_nothing_to_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("watch", tmp_path / "empty", "--once")
    assert result.exit_code == 2
    assert "holds no files of a run yet" in result.stderr
    result = run("watch", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "There is no folder" in result.stderr


def test_lines_are_written_while_the_run_continues(live: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "watch", str(live), "--every", "0.1"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "Step 7" in process.stdout.readline()
        assert "lowest stable rank" in process.stdout.readline()
        with (live / "pss_events.jsonl").open("a") as file:
            file.write("3}\n" + to_json_line(intervention(9)) + "\n")
        assert "Step 9" in process.stdout.readline()
        end(live)
        rest = process.stdout.read()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert rest.endswith("The run has ended.\n")


@pytest.mark.parametrize("on_screen", [True, False])
def test_ctrl_c_is_exit_code_130(on_screen: bool, live: Path) -> None:
    master, slave = pty.openpty()
    out = slave if on_screen else subprocess.PIPE
    with subprocess.Popen(
        [*PROGRAM, "watch", str(live), "--every", "0.1"],
        stdout=out,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
    ) as process:
        os.close(slave)
        shown = b""
        deadline = time.monotonic() + PATIENCE_SECONDS
        source = master if on_screen or process.stdout is None else process.stdout.fileno()
        while b"Step 7" not in shown and time.monotonic() < deadline:
            shown += os.read(source, 4096)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130
    os.close(master)
    assert b"Step 7" in shown
    assert b"[2J[red]" not in shown.replace(b"\\x1b[2J[red]", b"")
    assert b"Interrupted." in complaint
    assert b"Traceback" not in complaint


def test_help_shows_options_and_examples(run: Run) -> None:
    text = " ".join(run("watch", "--help").output.split())
    for words in ("--once", "--every", "--lines", "Exit codes", "Examples", "checkpoint"):
        assert words in text


def test_watch_imports_nothing_heavy(live: Path) -> None:
    end(live)
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hf_pss.cli.app import app\n"
        f"assert CliRunner().invoke(app, ['watch', {str(live)!r}]).exit_code == 0\n"
        "print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
