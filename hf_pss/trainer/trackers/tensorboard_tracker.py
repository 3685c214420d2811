"""A tracker for TensorBoard that uses the writer of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_pss.records.events import HealthReading
from hf_pss.records.messages import Alert
from hf_pss.trainer.trackers.tracker import Snapshot, Tracker, histogram_of, label_of, scalars_of
from hf_pss.view.numbers import significant

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker(Tracker):
    """Writes into the event file of the Trainer.

    A second writer in the same folder would open a second file. TensorBoard would then read only
    that newest file, and the Trainer's curves would stop. The Trainer closes its writer at the end
    of training. Later output opens a new file, which TensorBoard reads.

    Args:
        writer: A ``SummaryWriter``.
        owns_writer: Whether to close the writer at the end.
    """

    name = "tensorboard"
    max_rows = 500  # TensorBoard renders the table as one page of text

    def __init__(self, writer: Any, *, owns_writer: bool = False) -> None:
        self._writer = writer
        self._owns_writer = owns_writer

    @classmethod
    def of(
        cls, args: TrainingArguments, callbacks: Sequence[TrainerCallback]
    ) -> TensorBoardTracker:
        """Use the writer of the Trainer, or open one in ``runs/pss`` if the Trainer has none.

        Raises:
            ImportError: tensorboard is not installed.
        """
        from transformers.integrations import TensorBoardCallback

        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                return cls(callback.tb_writer)
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(args.output_dir, "runs", "pss")
        return cls(SummaryWriter(str(folder)), owns_writer=True)

    def report(self, reading: HealthReading) -> None:
        """Write scalars, including NaN and inf, and histograms."""
        for tag, value in scalars_of(reading):
            self._writer.add_scalar(tag, value, reading.step)
        for matrix, values in reading.spectra.items():
            histogram = histogram_of(values)
            if histogram is not None:
                self._writer.add_histogram(
                    f"pss_spectra/{label_of(matrix)}",
                    histogram.values,
                    reading.step,
                    bins=histogram.edges,
                )
        self._writer.flush()

    def alert(self, alert: Alert) -> None:
        """Write the alert as text, because TensorBoard has no alerts."""
        text = f"**{alert.level.name}** {alert.title}\n\n{alert.text}"
        self._writer.add_text("pss/alerts", text, alert.step)
        self._writer.flush()

    def snapshot(self, snapshot: Snapshot) -> None:
        """Write the table as text and the heat map as an image."""
        head = f"| {' | '.join(snapshot.columns)} |\n|{' --- |' * len(snapshot.columns)}\n"
        rows = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in snapshot.rows)
        self._writer.add_text("pss/table", head + rows, snapshot.step)
        if snapshot.heat_map is not None:
            self._writer.add_image(
                "pss/heat_map", snapshot.heat_map, snapshot.step, dataformats="HWC"
            )
        self._writer.flush()

    def finish(self) -> None:
        """Close the writer if this tracker has opened it."""
        if self._owns_writer:
            self._writer.close()


def _cell(value: int | str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return significant(value) if math.isfinite(value) else str(value)
    return str(value).replace("|", "\\|")
