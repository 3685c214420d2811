"""Weights & Biases, online and offline: through the run that the Trainer has opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_pss.errors import StateError
from hf_pss.records.messages import Alert
from hf_pss.records.steps import HealthReading
from hf_pss.trainer.trackers.tracker import Reporter, Snapshot, histogram_of, label_of, scalars_of

__all__ = ["WandbReporter"]

# The Trainer's own axis: it logs this key with every row and defines it as everyone's x.
_STEP = "train/global_step"


class WandbReporter(Reporter):
    """Logs rows of its own beside the Trainer's.

    Never with ``step=``: W&B's counter of rows is not the Trainer's step, and a row for a counter
    that has passed is dropped.

    Args:
        run: A ``wandb.Run`` that is open.
    """

    name = "wandb"
    max_rows = 10_000  # wandb.Table.MAX_ROWS: what is above is cut, with a warning

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def of(cls, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> WandbReporter:
        """Take the process's open run.

        Raises:
            StateError: None is open.
            ImportError: wandb is not installed.
        """
        import wandb

        if wandb.run is None:
            raise StateError("no W&B run is open in this process")
        return cls(wandb.run)

    def report(self, reading: HealthReading) -> None:
        """Log one row; NaN and inf arrive as such."""
        import wandb

        row: dict[str, Any] = dict(scalars_of(reading))
        for matrix, values in reading.spectra.items():
            histogram = histogram_of(values)
            if histogram is not None:
                counted = (histogram.counts, histogram.edges)
                row[f"pss_spectra/{label_of(matrix)}"] = wandb.Histogram(np_histogram=counted)
        self._log(row, reading.step)

    def alert(self, alert: Alert) -> None:
        """Raise an alert: W&B mails it, or sends it to Slack, as the user has set it up."""
        # W&B swallows a title that comes again within a minute; ours holds the step.
        self._run.alert(alert.title, alert.text, level=alert.level.name)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Log ``pss/table`` and ``pss/heat_map``."""
        import wandb

        rows = [list(row) for row in snapshot.rows]
        row: dict[str, Any] = {
            "pss/table": wandb.Table(
                columns=list(snapshot.columns), data=rows, allow_mixed_types=True
            )
        }
        if snapshot.heat_map is not None:
            row["pss/heat_map"] = wandb.Image(snapshot.heat_map)
        self._log(row, snapshot.step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        self._run.log({**row, _STEP: step})
