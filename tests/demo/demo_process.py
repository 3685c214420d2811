"""The demo in a process of its own: ``demo_process.py OUT LIBRARY RECIPE OPTIONS [real]``.

Recipe and options are JSON. Its runs are forks, which import nothing anew and read the small
library; with ``real`` they are what the demo itself starts.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from hf_pss.evidence import demo as runner
from hf_pss.evidence.demo_recipe import DemoRecipe


class Fork:
    """`subprocess.Popen` of ``python -m module``, as far as the demo uses it."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        assert words[:2] == [sys.executable, "-m"]
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        assert start_new_session
        given = (words[2:], stdout.fileno(), env)
        self._process = get_context("fork").Process(target=_run, args=given)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(words: Sequence[str], log: int, env: Mapping[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(env)
    sys.argv[:] = words
    sys.modules.pop(words[0], None)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main(out: Path, library: str, recipe: str, options: str, *real: str) -> None:
    paths = {**sysconfig.get_paths(), "stdlib": library}
    sysconfig.get_paths = lambda: paths  # type: ignore[assignment]
    if not real:
        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})  # type: ignore[assignment]
    given: dict[str, Any] = json.loads(options)
    status = runner.run_demo(DemoRecipe(**json.loads(recipe)), out, **given)
    sys.stdout.write(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
