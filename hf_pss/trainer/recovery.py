"""The interface that reports the outcome of each step to the recovery of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_pss.records.events import Record


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of one optimizer step, from which `RollbackMixin` detects failures."""

    loss: float | None
    is_finite: bool
    has_intervened: bool
    """Whether the monitor responded to a spike or a drop in this step."""
    has_changed_weights: bool
    """Whether the response changed a weight."""


class TrainingMonitor:
    """A callback that reports each step to `RollbackMixin`. A Trainer may have at most one.

    This class itself has seen nothing and does nothing. It stands for a callback that is missing.
    """

    @property
    def step(self) -> int:
        """The number of the optimizer step in progress. It starts at 1 and is 0 before that."""
        return 0

    def outcome(self) -> StepOutcome | None:
        """Return the outcome of the last step, or None before the first step has ended."""
        return None

    def write_records(self, records: Sequence[Record]) -> None:
        """Store records of the recovery together with the records of the monitor."""

    def before_training(self, *, is_rollback: bool, may_repair: bool) -> None:
        """Prepare for the Trainer's next ``on_train_begin``.

        Args:
            is_rollback: Whether the run continues from an older checkpoint after a rollback.
            may_repair: Whether the checkpoint is the one that the user asked to resume from.
        """

    def abort_step(self) -> None:
        """Clean up after an exception has ended a step."""

    def close(self) -> None:
        """Finish the output. It is called if an error ends the run without ``on_train_end``."""
