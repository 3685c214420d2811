"""The share of recent steps at which a series exceeded its own recent values by far."""

from __future__ import annotations

import math
from collections import deque
from typing import Self

from hf_pss.detection.state import (
    JSON,
    check_version,
    read_integer,
    read_list,
    read_number,
    read_object,
)
from hf_pss.errors import ConfigurationError

__all__ = ["SpikeScore"]

_VERSION = 1
_WHAT = "the state of a SpikeScore"
_KEYS = ("version", "num_steps", "window", "spikes", "nonfinite")
# A constant window has no scale. The number is OLMo's.
_NO_SCALE = 1e-10


class SpikeScore:
    """Counts x_t > mean + 6σ of the 128 values before it, as a share of the last 10,000 steps.

    The rule is that of OLMo-core's stability monitor, applied to loss and gradient norm. σ is the
    window's population standard deviation. A spike enters the window like any other value. A window
    that is not full yet, or has σ < 1e-10, reports no spike.

    Two details are ours. NaN and inf count as spikes and do not enter the window, which one NaN
    would spoil for 128 steps. Before `num_recent_steps` the score is the share of the steps so far.

    Cost: light, on the host. 128 numbers and two passes over them a step.

    Args:
        window_size: Number of earlier values to compare with, at least 2.
        num_recent_steps: Number of steps that the score covers, at least 1.
        num_sigmas: Distance above the mean at which a spike begins, above 0.

    Raises:
        ConfigurationError: A number is outside of its range.

    >>> score = SpikeScore(window_size=4, num_recent_steps=10)
    >>> [score.update(x) for x in (1.0, 1.1, 0.9, 1.0, 5.0)]
    [False, False, False, False, True]
    >>> score.score, score.num_nonfinite
    (0.2, 0)
    """

    def __init__(
        self, *, window_size: int = 128, num_recent_steps: int = 10_000, num_sigmas: float = 6.0
    ) -> None:
        if window_size < 2 or num_recent_steps < 1 or not 0 < num_sigmas < math.inf:
            raise ConfigurationError(
                f"You gave window_size={window_size}, num_recent_steps={num_recent_steps}, "
                f"num_sigmas={num_sigmas}; give at least 2, at least 1 and a number above 0."
            )
        self._window: deque[float] = deque(maxlen=window_size)
        self._num_recent_steps = num_recent_steps
        self._num_sigmas = num_sigmas
        self._num_steps = 0
        # Step numbers of rare events. Ten thousand flags would enlarge every checkpoint.
        self._spikes: deque[int] = deque()
        self._nonfinite: deque[int] = deque()

    def update(self, value: float) -> bool:
        """Add the next step's value, and return whether it is a spike or not finite."""
        is_spike = not math.isfinite(value) or self._stands_out(value)
        if is_spike:
            self._spikes.append(self._num_steps)
        if math.isfinite(value):
            self._window.append(value)
        else:
            self._nonfinite.append(self._num_steps)
        self._num_steps += 1
        for steps in (self._spikes, self._nonfinite):
            while steps and steps[0] < self._num_steps - self._num_recent_steps:
                steps.popleft()
        return is_spike

    @property
    def score(self) -> float:
        """Spikes as a share of the recent steps, in [0, 1]; NaN before the first."""
        steps = min(self._num_steps, self._num_recent_steps)
        return len(self._spikes) / steps if steps else math.nan

    @property
    def num_nonfinite(self) -> int:
        """Number of recent steps with NaN or inf, which count as spikes, too."""
        return len(self._nonfinite)

    def state(self) -> dict[str, JSON]:
        """Return the state for a resumed run, as strict JSON."""
        return {
            "version": _VERSION,
            "num_steps": self._num_steps,
            "window": list(self._window),
            "spikes": list(self._spikes),
            "nonfinite": list(self._nonfinite),
        }

    def restore(self, state: object) -> Self:
        """Restore a saved state, and return self.

        Raises:
            StateError: The state is truncated, of another version or of another kind. The score is
                unchanged.
        """
        check_version(state, _VERSION, _WHAT)
        found = read_object(state, _KEYS, _WHAT)
        num_steps = read_integer(found["num_steps"], f"the steps of {_WHAT}")
        window = [read_number(x, f"a value of {_WHAT}") for x in read_list(found["window"], _WHAT)]
        spikes, nonfinite = (
            [read_integer(x, f"a step of {_WHAT}") for x in read_list(found[key], _WHAT)]
            for key in ("spikes", "nonfinite")
        )
        self._num_steps = num_steps
        self._window = deque(window, maxlen=self._window.maxlen)
        self._spikes, self._nonfinite = deque(spikes), deque(nonfinite)
        return self

    def _stands_out(self, value: float) -> bool:
        if len(self._window) != self._window.maxlen:
            return False
        # Deviations of values near the largest float would overflow without the scale.
        scale = max(map(abs, self._window)) or 1.0
        window = [x / scale for x in self._window]
        mean = math.fsum(window) / len(window)
        sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
        if sigma * scale < _NO_SCALE:
            return False
        return value / scale > mean + self._num_sigmas * sigma
