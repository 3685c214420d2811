"""Trackio: through the run that the Trainer has opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_pss.errors import StateError
from hf_pss.records.messages import Alert
from hf_pss.records.steps import HealthReading
from hf_pss.trainer.trackers.tracker import Reporter, Snapshot, histogram_of, label_of, scalars_of

__all__ = ["TrackioReporter"]

_STEP = "train/global_step"


class TrackioReporter(Reporter):
    """Logs rows of its own beside the Trainer's, counted on by trackio as the Trainer's are.

    Args:
        run: A ``trackio.Run`` that is open. It may be finished later: what comes then is still
            written, in this thread.
    """

    name = "trackio"
    max_rows = 2_000  # one row of its database holds the table

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def of(cls, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> TrackioReporter:
        """Take the open run.

        Raises:
            StateError: None is open.
            ImportError: trackio is not installed.
        """
        from trackio import context_vars

        run = context_vars.current_run.get()
        if run is None:
            raise StateError("no trackio run is open in this process")
        return cls(run)

    def report(self, reading: HealthReading) -> None:
        """Log one row; trackio keeps NaN and inf as words."""
        import trackio

        row: dict[str, Any] = dict(scalars_of(reading))
        for matrix, values in reading.spectra.items():
            histogram = histogram_of(values)
            if histogram is not None:
                counted = (histogram.counts, histogram.edges)
                row[f"pss_spectra/{label_of(matrix)}"] = trackio.Histogram(np_histogram=counted)
        self._log(row, reading.step)

    def alert(self, alert: Alert) -> None:
        """Raise an alert; trackio prints it, too, and calls a webhook that is set up."""
        import trackio

        self._run.alert(alert.title, alert.text, level=trackio.AlertLevel[alert.level.name])

    def snapshot(self, snapshot: Snapshot) -> None:
        """Log ``pss/table`` and ``pss/heat_map``."""
        import trackio

        rows = [list(row) for row in snapshot.rows]
        row: dict[str, Any] = {
            "pss/table": trackio.Table(columns=list(snapshot.columns), data=rows)
        }
        if snapshot.heat_map is not None:
            row["pss/heat_map"] = trackio.Image(snapshot.heat_map)
        self._log(row, snapshot.step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        self._run.log({**row, _STEP: step})
