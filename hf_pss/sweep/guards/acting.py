"""What the guards that act through a callback have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

__all__ = ["ActingCallback"]


class ActingCallback(TrainerCallback):
    """A callback that changes gradients, weights or rates, and says when and for how long."""

    def __init__(self) -> None:
        self.intervention_steps: list[int] = []
        """Steps, from 1, at which something was changed."""
        self.seconds = 0.0
        """Time inside the guard, watching included."""

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
