"""Runs in processes of their own: how many, how they end, and that none outlives its parent."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import NoReturn

__all__ = ["end_with_parent", "num_cores", "signals_interrupt", "versions"]

_POLL_SECONDS = 1.0


def num_cores() -> int:
    """Count the cores that this process may use, where the system tells, or else all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("hf-pss", "torch", "transformers", "accelerate", "tokenizers")
    others = ("pytorch_optimizer", "scipy")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    for name in others:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def end_with_parent(parent: int) -> None:
    """End this process soon after the given one is not its parent any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that they leave results and no orphan."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are somebody else's
        return
    # Windows has no SIGHUP; under nohup it is ignored, and stays so.
    wanted = [one for one in signal.Signals if one.name in ("SIGTERM", "SIGHUP")]
    heeded = [one for one in wanted if signal.getsignal(one) not in (None, signal.SIG_IGN)]
    before = {one: signal.signal(one, interrupt) for one in heeded}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
