"""How real runs with workers of a data loader end when their process group is signalled."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from preloaded import Process, children_of, is_running, start, wait_until

from hf_pss.runs.checkpoint import examine
from hf_pss.runs.folder import checkpoints_by_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@contextmanager
def run_with_workers(folder: Path, start_method: str) -> Iterator[Process]:
    script = Path(__file__).with_name("signalled_worker.py")
    with start(script, folder, start_method) as process:
        wait_until(
            lambda: process.poll() is not None or (folder / "begun").exists(), "it never began"
        )
        assert process.poll() is None, process.errors
        yield process


@pytest.mark.parametrize(
    ("start_method", "signum", "code"),
    [
        ("fork", signal.SIGTERM, 143),
        pytest.param("spawn", signal.SIGTERM, 143, marks=pytest.mark.slow),
        # KeyboardInterrupt ends Python by the signal.
        pytest.param("spawn", signal.SIGINT, -signal.SIGINT, marks=pytest.mark.slow),
        ("fork", signal.SIGHUP, 129),
    ],
)
def test_a_signal_to_the_group_of_a_run_with_workers_saves(
    start_method: str, signum: int, code: int, tmp_path: Path
) -> None:
    """It comes twice, as from a scheduler and from a launcher that passes it on."""
    with run_with_workers(tmp_path, start_method) as process:
        children = children_of(process.pid)
        os.killpg(process.pid, signum)
        time.sleep(0.1)
        os.killpg(process.pid, signum)
        assert process.wait() == code, process.errors
        (saved,) = checkpoints_by_step(tmp_path)
        assert examine(saved).is_whole
        assert "Traceback" not in process.errors or signum == signal.SIGINT
        wait_until(lambda: not any(map(is_running, children)), "a worker has outlived its run")


def test_workers_die_with_a_killed_run(tmp_path: Path) -> None:
    with run_with_workers(tmp_path, "fork") as process:
        children = children_of(process.pid)
        assert len(children) == 2
        process.kill()
        process.wait()
        os.kill(children[0], signal.SIGTERM)  # the other one finds out by itself
        wait_until(lambda: not any(map(is_running, children)), "a worker has outlived its run")
