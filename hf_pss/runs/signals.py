"""Let SIGTERM and SIGHUP end a program in order, so that it removes its temporary files."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP act like Ctrl-C, so that they leave results and no orphans.

    Later ones are ignored until the block ends, because systems send both, or one of them twice.
    """

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        for one in handled:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only
        return
    # Windows has no SIGHUP. If nohup has set it to be ignored, it stays ignored.
    wanted = [one for one in signal.Signals if one.name in ("SIGTERM", "SIGHUP")]
    handled = [one for one in wanted if signal.getsignal(one) not in (None, signal.SIG_IGN)]
    before = {one: signal.signal(one, interrupt) for one in handled}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
