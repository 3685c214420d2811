"""Numbers that are followed from step to step on the host: spikes, rates of change, an alarm."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Self

from hf_pss.detection.state import (
    JSON,
    check_version,
    read_integer,
    read_list,
    read_number,
    read_object,
)

_VERSION = 1
_WHAT = "the state of a SpikeScore"
_KEYS = ("version", "num_steps", "window", "spikes", "nonfinite")
# If all values of the window are equal, it has no scale. The number comes from OLMo.
_NO_SCALE = 1e-10

ALARM_RATIO = 10.0
"""The factor in κ(V) between stable and unstable phases (arXiv 2605.23476)."""

# The number of readings before the alarm has a reference, and the weight of the newest one [ours].
_CALIBRATION_READINGS, _ALPHA = 10, 0.1


class SpikeScore:
    """Counts x_t > mean + 6σ of the previous 128 values, as a share of the last 10,000 steps.

    The rule is that of OLMo-core's stability monitor, applied to loss and gradient norm. σ is the
    population standard deviation of the window. A spike enters the window like any other value. If
    the window is not full yet, or has σ < 1e-10, no spike is reported.

    Two details are ours. First, NaN and inf count as spikes, but do not enter the window, because
    one NaN would spoil it for 128 steps. Second, before `num_recent_steps` have passed, the score
    is the share of the steps so far.

    Cost: light, on the host. It keeps 128 numbers and makes two passes over them per step.

    Args:
        window_size: Number of previous values to compare with, at least 2.
        num_recent_steps: Number of steps that the score covers, at least 1.
        num_sigmas: Distance above the mean, in σ, at which a spike begins. It is above 0.

    >>> score = SpikeScore(window_size=4, num_recent_steps=10)
    >>> [score.update(x) for x in (1.0, 1.1, 0.9, 1.0, 5.0)]
    [False, False, False, False, True]
    >>> score.score, score.num_nonfinite
    (0.2, 0)
    """

    def __init__(
        self, *, window_size: int = 128, num_recent_steps: int = 10_000, num_sigmas: float = 6.0
    ) -> None:
        self._window: deque[float] = deque(maxlen=window_size)
        self._num_recent_steps = num_recent_steps
        self._num_sigmas = num_sigmas
        self._num_steps = 0
        # The step numbers of rare events. A flag for each of ten thousand steps would
        # enlarge every checkpoint.
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
        """Spikes as a share of the recent steps, in [0, 1]. It is NaN before the first step."""
        steps = min(self._num_steps, self._num_recent_steps)
        return len(self._spikes) / steps if steps else math.nan

    @property
    def num_nonfinite(self) -> int:
        """The number of recent steps with NaN or inf. These also count as spikes."""
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
            StateError: The state is truncated, of a different version or of a different kind. The
                score is then unchanged.
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
        # Without the scale, deviations of values near the largest float would overflow.
        scale = max(map(abs, self._window)) or 1.0
        window = [x / scale for x in self._window]
        mean = math.fsum(window) / len(window)
        sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
        if sigma * scale < _NO_SCALE:
            return False
        return value / scale > mean + self._num_sigmas * sigma


class ChangeRates:
    """Relative rates of change per step of positive numbers by name: (ln x_t − ln x_s) / (t − s).

    [ours] It applies to σ₁, ‖W‖_F, stable rank and effective rank. A rate of 0.01 is
    one per cent per step, and the rate of a product is the sum of its factors' rates. A
    new name has no rate yet.

    >>> rates = ChangeRates()
    >>> rates.of(10, {"w": 1.0}), rates.of(12, {"w": math.e})
    ({}, {'w': 0.5})
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def of(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return the rates since the last value of each name, and store the new values.

        A rate is NaN if one of the two values is not positive and finite. Such a value is not
        stored, so one NaN spoils only one rate.

        Args:
            step: The step of the values. A name is skipped if its last value comes from
                this step or a later one.
            values: The values by name. Each name may have any unit, but must keep it.
        """
        rates = {}
        for name, value in values.items():
            last_step, last = self._last.get(name, (step, math.nan))
            is_usable = 0 < value < math.inf
            if last_step < step:
                both = is_usable and last > 0
                rate = (math.log(value) - math.log(last)) / (step - last_step) if both else math.nan
                rates[name] = rate
            if is_usable and (name not in self._last or last_step < step):
                self._last[name] = (step, value)
        return rates


class ConditionAlarm:
    """Compares √κ(M) with its moving average, which restarts after each alarm [ours]."""

    def __init__(self) -> None:
        self.reference = 0.0
        """The moving average."""
        self.num_readings = 0
        """The number of readings in the moving average."""

    def update(self, condition: float) -> float | None:
        """Add a finite value. Return the reference from which it has moved, or None.

        The first 10 readings after the start or after an alarm only calibrate.
        """
        has_reference = self.num_readings >= _CALIBRATION_READINGS
        before = None
        if has_reference and has_moved(self.reference, condition):
            before, self.num_readings = self.reference, 0
        old = condition if self.num_readings == 0 else self.reference
        self.reference = old + _ALPHA * (condition - old)
        self.num_readings += 1
        return before


def has_moved(reference: float, now: float) -> bool:
    """Return whether the bound changed by the paper's order of magnitude up or down, or is NaN.

    Our reference is the moving average of the bound. An absolute level has no meaning, because ε
    alone can determine it.

    >>> has_moved(100.0, 300.0), has_moved(100.0, 1000.0), has_moved(100.0, 9.0)
    (False, True, True)
    """
    return not reference / ALARM_RATIO < now < reference * ALARM_RATIO
