"""The running baseline that a detector compares readings with."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from hf_pss.detection.state import JSON, read_integer, read_number, read_object
from hf_pss.errors import ConfigurationError

# A quotient by a denormal float64 has lost its digits, and one by 0 is undefined.
_SMALLEST_LEVEL = sys.float_info.min


@dataclass(slots=True)
class Baseline:
    """Exponential moving average of accepted finite values >= 0, with a calibration phase.

    ``b_1 = g_1`` and ``b_t = (1 - alpha) b_{t-1} + alpha g_t`` over the accepted values (the
    average is the paper's, arXiv 2602.01308; alpha and the rules below are ours). The average
    starts at the first value, so it has no bias towards zero to correct. Only the weight of that
    first value remains, ``(1 - alpha)^(t-1)``, and the calibration phase waits until it has faded:
    0.14 after 20 values at alpha = 0.1.

    Three rules keep the average from doing harm:

    - A level of 0 (or denormal) has no scale. Nothing is compared with it, and the next value
      restarts the baseline instead of being averaged into it.
    - A value that fired is refused: the baseline does not learn it.
    - After `patience_steps` refusals in a row the baseline restarts at the new level and calibrates
      again. Otherwise one lasting rise would fire at every later step.

    >>> baseline = Baseline(alpha=0.5, calibration_steps=2, patience_steps=10)
    >>> baseline.accept(1.0)
    >>> baseline.accept(2.0)
    >>> baseline.level, baseline.is_calibrated, baseline.ratio(6.0)
    (1.5, True, 4.0)
    """

    alpha: float
    """Weight of the newest value, in (0, 1]."""
    calibration_steps: int
    """Values to accept before anything may fire, >= 1."""
    patience_steps: int
    """Refusals in a row after which the new level is accepted, >= 1."""
    level: float = 0.0
    """b_t; 0 before the first value."""
    num_accepted: int = 0
    """Values in the average since it last started."""
    num_refused: int = 0
    """Refusals in a row, up to now."""

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
        """Return ``value / b_{t-1}``; None where the level has no scale; inf where it overflows."""
        return value / self.level if self._has_scale else None

    def accept(self, value: float) -> None:
        """Learn a finite value >= 0."""
        if not self._has_scale:
            self._start_at(value)
            return
        mixed = (1 - self.alpha) * self.level + self.alpha * value
        # Rounding can lift the mean above both of its parts, which near 1.8e308 would give inf.
        self.level = min(mixed, max(self.level, value))
        self.num_accepted += 1
        self.num_refused = 0

    def refuse(self, value: float) -> bool:
        """Do not learn `value`; return True if patience ends and the baseline restarts at it."""
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
