"""Trackers for Weights & Biases and trackio, which add rows to the run that the Trainer opened."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_pss.errors import StateError
from hf_pss.records.events import HealthReading
from hf_pss.records.messages import Alert
from hf_pss.trainer.trackers.tracker import Snapshot, Tracker, histogram_of, label_of, scalars_of

__all__ = ["TrackioTracker", "WandbTracker"]

# The Trainer logs this key with every row and defines it as the x axis of every curve.
_STEP = "train/global_step"


class _RowTracker(Tracker):
    """Logs rows in addition to those of the Trainer.

    It never passes ``step=``. The row counter of W&B is not the step of the Trainer, and W&B drops
    a row whose counter value has passed.

    Args:
        run: An open run of the library.
        library: The module ``wandb`` or ``trackio``.
        table_options: Additional arguments of the library's ``Table``.
    """

    def __init__(self, run: Any, library: ModuleType, **table_options: object) -> None:
        self._run = run
        self._library: Any = library
        self._table_options = table_options

    def report(self, reading: HealthReading) -> None:
        """Log the reading as one row, including NaN and inf."""
        row: dict[str, Any] = dict(scalars_of(reading))
        for matrix, values in reading.spectra.items():
            if (histogram := histogram_of(values)) is not None:
                counted = (histogram.counts, histogram.edges)
                label = f"pss_spectra/{label_of(matrix)}"
                row[label] = self._library.Histogram(np_histogram=counted)
        self._log(row, reading.step)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Log ``pss/table`` and ``pss/heat_map``."""
        rows = [list(row) for row in snapshot.rows]
        columns = list(snapshot.columns)
        table = self._library.Table(columns=columns, data=rows, **self._table_options)
        row: dict[str, Any] = {"pss/table": table}
        if snapshot.heat_map is not None:
            row["pss/heat_map"] = self._library.Image(snapshot.heat_map)
        self._log(row, snapshot.step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        self._run.log({**row, _STEP: step})


class WandbTracker(_RowTracker):
    """Logs to Weights & Biases, online or offline.

    Args:
        run: An open ``wandb.Run``.
    """

    name = "wandb"
    max_rows = 10_000  # wandb.Table.MAX_ROWS: W&B cuts further rows with a warning

    def __init__(self, run: Any) -> None:
        import wandb

        super().__init__(run, wandb, allow_mixed_types=True)

    @classmethod
    def of(cls, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> WandbTracker:
        """Return a tracker for the W&B run that is open in this process.

        Raises:
            StateError: No run is open.
            ImportError: wandb is not installed.
        """
        import wandb

        if wandb.run is None:
            raise StateError("no W&B run is open in this process")
        return cls(wandb.run)

    def alert(self, alert: Alert) -> None:
        """Send an alert, which W&B mails or posts to Slack, depending on the user's settings."""
        # W&B drops a title that is repeated within a minute. The titles of PSS contain the step.
        self._run.alert(alert.title, alert.text, level=alert.level.name)


class TrackioTracker(_RowTracker):
    """Logs to trackio, which stores NaN and inf as strings.

    Args:
        run: A ``trackio.Run``. A finished run still writes, but in the calling thread.
    """

    name = "trackio"
    max_rows = 2_000  # trackio stores the table in one row of its database

    def __init__(self, run: Any) -> None:
        import trackio

        super().__init__(run, trackio)

    @classmethod
    def of(cls, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> TrackioTracker:
        """Return a tracker for the trackio run that is open in this process.

        Raises:
            StateError: No run is open.
            ImportError: trackio is not installed.
        """
        from trackio import context_vars

        run = context_vars.current_run.get()
        if run is None:
            raise StateError("no trackio run is open in this process")
        return cls(run)

    def alert(self, alert: Alert) -> None:
        """Send an alert. Trackio also prints it and calls a webhook if one is configured."""
        level = self._library.AlertLevel[alert.level.name]
        self._run.alert(alert.title, alert.text, level=level)
