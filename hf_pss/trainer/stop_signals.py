"""SIGTERM and SIGINT as a wish to stop at the end of the step: saved first, then 128 + n."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

__all__ = ["StopWish", "leave"]

logger = logging.getLogger(__name__)

_WISHES = (signal.SIGTERM, signal.SIGINT)


class StopWish:
    """Holds the first of these signals back while the block runs, and remembers it.

    The second of the same kind does what it always did: a Ctrl-C that cannot wait is not lost.
    Signals that are ignored stay ignored (nohup), and outside of the main thread, where Python
    handles none, nothing is done.

    Children that are forked meanwhile inherit the handler. They have no step to end: SIGTERM does
    with them what it always did. Their first SIGINT, which a terminal sends to all of a group, is
    held back without a word, so that a loader's workers live until the step is saved.

    Args:
        heeds: The signals to hold back; by default SIGTERM and SIGINT.
    """

    def __init__(self, heeds: tuple[signal.Signals, ...] = _WISHES) -> None:
        self.signum = 0
        self._heeds = heeds
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        """Begin to hold them back."""
        if threading.current_thread() is threading.main_thread():
            for one in self._heeds:
                before = signal.getsignal(one)
                if before not in (None, signal.SIG_IGN):
                    self._before[one] = before
                    signal.signal(one, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the handlers back that were there."""
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
        with suppress(RuntimeError):  # the signal may have come while a line was being written
            logger.warning(
                "%s: saving at the end of this step, then leaving. Once more: leaving at once.",
                one.name,
            )


def leave(signum: int) -> NoReturn:
    """End as programs end that a signal ends: with 128 + signum.

    Raises:
        KeyboardInterrupt: For SIGINT: what handles a Ctrl-C, as `hf-pss` does, handles this.
        SystemExit: For any other.
    """
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
