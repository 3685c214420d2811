"""The running baseline to which a detector compares readings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from hf_pss.detection.state import JSON, read_integer, read_number, read_object
from hf_pss.errors import ConfigurationError

# A quotient by a denormal float64 has lost its digits, and a quotient by 0 is undefined.
_SMALLEST_LEVEL = sys.float_info.min


@dataclass(slots=True)
class Baseline:
    """Exponential moving average of accepted finite values >= 0, with a calibration phase.

    It is ``b_1 = g_1`` and ``b_t = (1 - alpha) b_{t-1} + alpha g_t`` over the accepted values. The
    average comes from the paper, arXiv 2602.01308. The value of alpha and the rules below are ours.
    The average starts at the first value, so it has no bias towards zero to correct. But the first
    value keeps the weight ``(1 - alpha)^(t-1)``. The calibration phase waits until this weight is
    small: it is 0.14 after 20 values at alpha = 0.1.

    Three rules prevent harm from the average:

    - A level of 0 (or denormal) has no scale. Nothing is compared with it, and the next value
      restarts the baseline instead of being averaged into it.
    - A value that fired is refused, which means that the baseline does not learn it.
    - After `patience_steps` refusals in a row the baseline restarts at the new level and calibrates
      again. Otherwise one lasting rise would fire at every later step.

    >>> baseline = Baseline(alpha=0.5, calibration_steps=2, patience_steps=10)
    >>> baseline.accept(1.0)
    >>> baseline.accept(2.0)
    >>> baseline.level, baseline.is_calibrated, baseline.ratio(6.0)
    (1.5, True, 4.0)
    """

    alpha: float
    """The weight of the newest value, in (0, 1]."""
    calibration_steps: int
    """The number of values to accept before anything may fire, >= 1."""
    patience_steps: int
    """The number of refusals in a row after which the new level is accepted, >= 1."""
    level: float = 0.0
    """b_t. It is 0 before the first value."""
    num_accepted: int = 0
    """The number of values in the average since it last started."""
    num_refused: int = 0
    """The current number of refusals in a row."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigurationError(
                f"You gave alpha={self.alpha} to a baseline; choose a number in (0, 1]."
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether a value may be judged against the level."""
        return self._has_scale and self.num_accepted >= self.calibration_steps

    def ratio(self, value: float) -> float | None:
        """Return ``value / b_{t-1}``, None if the level has no scale, or inf if it overflows."""
        return value / self.level if self._has_scale else None

    def accept(self, value: float) -> None:
        """Learn a finite value >= 0."""
        if not self._has_scale:
            self._start_at(value)
            return
        mixed = (1 - self.alpha) * self.level + self.alpha * value
        # Rounding can lift the mean above both values, which near 1.8e308 would give inf.
        self.level = min(mixed, max(self.level, value))
        self.num_accepted += 1
        self.num_refused = 0

    def refuse(self, value: float) -> bool:
        """Do not learn `value`. If patience ends, restart the baseline at it and return True."""
        self.num_refused += 1
        if self.num_refused < self.patience_steps:
            return False
        self._start_at(value)
        return True

    def state(self) -> dict[str, JSON]:
        """Return the learned numbers, as one part of a detector's versioned state."""
        return {
            "level": self.level,
            "num_accepted": self.num_accepted,
            "num_refused": self.num_refused,
        }

    def with_state(self, state: object, *, what: str) -> Baseline:
        """Return a baseline with these settings and the given state.

        Raises:
            StateError: `state` does not have the form that `state()` returns.
        """
        fields = read_object(state, ("level", "num_accepted", "num_refused"), what)
        return replace(
            self,
            level=read_number(fields["level"], minimum=0.0, what=f"'level' of {what}"),
            num_accepted=read_integer(
                fields["num_accepted"], minimum=1, what=f"'num_accepted' of {what}"
            ),
            num_refused=read_integer(fields["num_refused"], what=f"'num_refused' of {what}"),
        )

    @property
    def _has_scale(self) -> bool:
        return self.level >= _SMALLEST_LEVEL

    def _start_at(self, value: float) -> None:
        self.level, self.num_accepted, self.num_refused = value, 1, 0
