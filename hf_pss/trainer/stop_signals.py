"""Delay SIGTERM, SIGINT and SIGHUP until a step has been saved."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, Self

from torch import multiprocessing
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

# A launcher forwards a signal that the system has already sent to the whole process group. Both
# deliveries are one request. A person takes longer to read the message and press Ctrl-C again.
_ONE_REQUEST_SECONDS = 2.0


class DelayedSignals:
    """Delays the first signal of each kind while the block runs, and records it.

    Deliveries of the same signal within 2 seconds count as one, because a launcher may repeat the
    signal. A later one has its usual effect, so a second Ctrl-C stops at once. Signals that are
    ignored, for example under nohup, stay ignored. Python handles signals only in the main thread,
    so the class does nothing in other threads.

    A terminal or a scheduler often signals the whole process group. If a worker of a data loader
    ended, the run could not save. Workers that start inside the block therefore ignore the signals
    until the block ends or the process dies. Other forked processes inherit the handler. Their
    first SIGINT is delayed silently, and every other signal has its usual effect on them.

    Args:
        signals: The signals to delay.
    """

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.signum = 0
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._received_at: dict[signal.Signals, float] = {}
        self._pid = os.getpid()
        self._is_delaying = RawValue("b", 0)  # in memory that the workers share

    def __enter__(self) -> Self:
        """Start delaying the signals."""
        if threading.current_thread() is threading.main_thread():
            for one in self._signals:
                before = signal.getsignal(one)
                if before not in (None, signal.SIG_IGN):
                    self._before[one] = before
                    signal.signal(one, self._remember)
        if self._before:
            self._iterate = DataLoader.__iter__
            self._is_delaying.value = 1
            DataLoader.__iter__ = self._keeping_workers(self._iterate)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous handlers."""
        if not self._before:
            return
        DataLoader.__iter__ = self._iterate  # type: ignore[method-assign]
        self._is_delaying.value = 0
        for one, before in self._before.items():
            signal.signal(one, before)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        one, now = signal.Signals(signum), time.monotonic()
        is_first = one not in self._received_at
        received_at = self._received_at.setdefault(one, now)
        if os.getpid() != self._pid:
            is_delayed = is_first and one == signal.SIGINT
        else:
            is_delayed = now - received_at <= _ONE_REQUEST_SECONDS
        if not is_delayed:
            signal.signal(one, self._before[one])
            os.kill(os.getpid(), signum)
        elif is_first and os.getpid() == self._pid:
            self.signum = self.signum or signum
            with suppress(RuntimeError):  # the signal may have interrupted a log call
                logger.warning(
                    "%s: saving at the end of this step, then exiting. Send it again to exit at "
                    "once.",
                    one.name,
                )

    def _keeping_workers(self, iterate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return ``DataLoader.__iter__`` with a `worker_init_fn` that keeps the workers alive."""

        @functools.wraps(iterate)
        def start_workers(loader: Any) -> Any:
            if not loader.num_workers:
                return iterate(loader)
            own = loader.worker_init_fn
            loader.worker_init_fn = _Worker(tuple(self._before), self._is_delaying, own)
            context = loader.multiprocessing_context or multiprocessing
            # The workers inherit the mask, and `_Worker` removes it. A fork server would pass it on
            # to the other processes that it starts.
            is_masked = sys.platform != "win32" and context.get_start_method() != "forkserver"
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before) if is_masked else ()
            try:
                return iterate(loader)
            finally:
                loader.worker_init_fn = own
                if is_masked:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        return start_workers


class _Worker:
    """A `worker_init_fn` that makes a worker ignore signals until the parent's block has ended.

    After that, the worker obeys the signal by which its parent ends it.
    """

    def __init__(
        self,
        signals: tuple[signal.Signals, ...],
        is_delaying: Any,
        own: Callable[[int], None] | None,
    ) -> None:
        self._signals, self._is_delaying, self._own = signals, is_delaying, own
        self._parent = 0

    def __call__(self, worker_id: int) -> None:
        self._parent = os.getppid()
        for one in self._signals:
            # It must be a handler, because programs that the worker starts would inherit SIG_IGN.
            signal.signal(one, self._obey)
        if sys.platform != "win32":
            # The main thread cannot run a handler while it waits inside C code, so a second thread
            # learns of the signals, too.
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        if self._own is not None:
            self._own(worker_id)

    def _obey(self, *_: object) -> None:
        if not self._is_delaying.value or os.getppid() != self._parent:
            os._exit(0)

    def _watch(self, signals_received: int) -> None:
        while os.read(signals_received, 1):
            self._obey()
