"""The options of recovery, and the interface that reports the outcome of each step to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_pss.config import Options, option
from hf_pss.records.events import Record


@dataclass(frozen=True, slots=True)
class RecoveryConfig(Options):
    """Options of `SafeCheckpointsMixin` and `RollbackMixin`. They do not depend on PSS.

    >>> RecoveryConfig(on_failure="rollback").max_rollbacks
    3

    Raises:
        ConfigurationError: An option is out of range.
    """

    # The default is cautious, because a rollback changes which batches a run is trained on.
    on_failure: Literal["smooth", "rollback", "stop"] = option(
        "smooth",
        "If interventions fail repeatedly, smooth: continue to smooth; rollback: return to the "
        "last healthy checkpoint and skip the batches after it (one process and DDP); stop: stop "
        "with an error.",
    )
    # Not measured.
    failure_window_steps: int = option(
        50,
        "An intervention has failed if another one follows within this many steps, or if the loss "
        "has not returned to its level after them.",
        minimum=1,
    )
    # Not measured.
    max_failed_interventions: int = option(
        3, "This many failed interventions in a row count as a failure of the run.", minimum=1
    )
    # Not measured.
    max_rollbacks: int = option(
        3, "Roll back at most this many times in one call of train(), then stop.", minimum=1
    )
    missing_state: Literal["refuse", "fresh"] = option(
        "refuse",
        "If optimizer.pt or scheduler.pt of a checkpoint is missing or unreadable, refuse: do not "
        "resume; fresh: resume and start that part from its initial state.",
    )


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
