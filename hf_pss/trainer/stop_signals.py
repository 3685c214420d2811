"""Delay SIGTERM and SIGINT until a step has been saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

logger = logging.getLogger(__name__)


class DelayedSignals:
    """Delays the first signal of each kind while the block runs, and records it.

    A second signal of the same kind has its usual effect, so a second Ctrl-C stops at once. Signals
    that are ignored, for example under nohup, stay ignored. Python handles signals only in the main
    thread, so the class does nothing in other threads.

    Forked child processes inherit the handler. SIGTERM has its usual effect on them. A terminal
    sends SIGINT to the whole process group, so children silently delay their first SIGINT. The
    workers of a data loader therefore survive until the step is saved.

    Args:
        signals: The signals to delay.
    """

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.signum = 0
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        """Start delaying the signals."""
        if threading.current_thread() is threading.main_thread():
            for one in self._signals:
                before = signal.getsignal(one)
                if before not in (None, signal.SIG_IGN):
                    self._before[one] = before
                    signal.signal(one, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous handlers."""
        for one, before in self._before.items():
            signal.signal(one, before)
        self._before.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        one = signal.Signals(signum)
        signal.signal(one, self._before.pop(one))
        if os.getpid() != self._pid:
            if one == signal.SIGTERM:
                os.kill(os.getpid(), signum)
            return
        self.signum = self.signum or signum
        with suppress(RuntimeError):  # the signal may have interrupted a log call
            logger.warning(
                "%s: saving at the end of this step, then exiting. Send it again to exit at once.",
                one.name,
            )
