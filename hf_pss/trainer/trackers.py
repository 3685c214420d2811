"""Report health numbers, spectra, heat maps, tables and alerts to the trackers of a run.

`trackers_for` finds the trackers that the Trainer itself uses. To add a tracker, write one class
with the methods of `Tracker` and add one row to `TRACKERS`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_pss.errors import StateError
from hf_pss.records.events import HealthReading, Record
from hf_pss.records.messages import Alert, Alerts
from hf_pss.trainer.tracker_content import (
    Curves,
    Image,
    Snapshot,
    ThinnedReadings,
    draw_heat_map,
    histogram_of,
    label_of,
    scalars_of,
)
from hf_pss.view.numbers import significant

logger = logging.getLogger(__name__)

# The Trainer logs this key with every row and defines it as the x axis of every curve.
_STEP = "train/global_step"
# A snapshot follows when the number of readings has doubled. The last snapshot of a killed run
# therefore lacks at most half of the readings. pss_health.jsonl holds all of them.
_FIRST_SNAPSHOT = 4


class Tracker(ABC):
    """One tracker. A method may raise an exception, which `Trackers` turns into one warning."""

    name: str
    """The name that ``report_to`` uses for the tracker."""
    max_rows: int
    """The largest number of rows that a table in this tracker may have."""

    @abstractmethod
    def report(self, reading: HealthReading) -> None:
        """Log the numbers of a reading and histograms of its spectra."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Raise an alert."""

    @abstractmethod
    def snapshot(self, snapshot: Snapshot) -> None:
        """Log the table and the heat map. Each call replaces the previous ones of the same name."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to close
        """Finish the output of PSS. The Trainer owns the tracker's run, so it stays open."""


class _RowTracker(Tracker):
    """Logs rows in addition to those of the Trainer.

    It never passes ``step=``. The row counter of W&B is not the step of the Trainer, and W&B drops
    a row whose counter value has passed.

    Args:
        run: An open run of the library.
        library: The module ``wandb`` or ``trackio``.
        table_options: Additional arguments of the library's ``Table``.
    """

    title: str
    """The name of the tracker in messages."""

    def __init__(self, run: Any, library: ModuleType, **table_options: object) -> None:
        if run is None:
            raise StateError(f"no {self.title} run is open in this process")
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

    def alert(self, alert: Alert) -> None:
        """Send an alert.

        W&B mails it or posts it to Slack, depending on the user's settings. Trackio prints it and
        calls a webhook if one is configured.
        """
        # W&B drops a title that is repeated within a minute. The titles of PSS contain the step.
        level = self._library.AlertLevel[alert.level.name]
        self._run.alert(alert.title, alert.text, level=level)

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

    Raises:
        StateError: No run is open in this process.
        ImportError: wandb is not installed.
    """

    name, title = "wandb", "W&B"
    max_rows = 10_000  # wandb.Table.MAX_ROWS: W&B cuts further rows with a warning

    def __init__(self, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
        import wandb

        super().__init__(wandb.run, wandb, allow_mixed_types=True)


class TrackioTracker(_RowTracker):
    """Logs to trackio, which stores NaN and inf as strings.

    A finished run still writes, but in the calling thread.

    Raises:
        StateError: No run is open in this process.
        ImportError: trackio is not installed.
    """

    name = title = "trackio"
    max_rows = 2_000  # trackio stores the table in one row of its database

    def __init__(self, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
        import trackio
        from trackio import context_vars

        super().__init__(context_vars.current_run.get(), trackio)


class TensorBoardTracker(Tracker):
    """Writes into the event file of the Trainer, or into ``runs/pss`` if the Trainer has none.

    A second writer in the same folder would open a second file. TensorBoard would then read only
    that newest file, and the Trainer's curves would stop. The Trainer closes its writer at the end
    of training. Later output opens a new file, which TensorBoard reads.

    Raises:
        ImportError: tensorboard is not installed.
    """

    name = "tensorboard"
    max_rows = 500  # TensorBoard renders the table as one page of text

    def __init__(self, args: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
        from transformers.integrations import TensorBoardCallback

        theirs = [c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)]
        self._writer: Any = next((writer for writer in theirs if writer is not None), None)
        self._owns_writer = self._writer is None
        if self._owns_writer:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(args.output_dir, "runs", "pss")))

    def report(self, reading: HealthReading) -> None:
        """Write scalars, including NaN and inf, and histograms."""
        for tag, value in scalars_of(reading):
            self._writer.add_scalar(tag, value, reading.step)
        for matrix, values in reading.spectra.items():
            if (histogram := histogram_of(values)) is not None:
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


TRACKERS: Mapping[
    str, tuple[str, Callable[[TrainingArguments, Sequence[TrainerCallback]], Tracker]]
] = MappingProxyType(
    {
        "wandb": ("WandbCallback", WandbTracker),
        "tensorboard": ("TensorBoardCallback", TensorBoardTracker),
        "trackio": ("TrackioCallback", TrackioTracker),
    }
)
"""For each name in ``report_to``, the name of the Trainer's callback class, and the tracker."""


def trackers_for(args: TrainingArguments, callbacks: Iterable[TrainerCallback] = ()) -> Trackers:
    """Return the trackers that the Trainer uses.

    Call this function in ``on_train_begin`` or later, and only on the first process. By then
    the Trainer's own callbacks have opened their runs, because they come before the callbacks
    of the user.

    Args:
        args: The training arguments, whose ``report_to`` names the trackers.
        callbacks: The callbacks of the Trainer. The callback of a tracker counts even if
            ``report_to`` does not name the tracker. The TensorBoard tracker uses the writer of the
            TensorBoard callback, or opens a separate folder without such a callback.
    """
    held = tuple(callbacks)
    classes = {cls.__name__ for callback in held for cls in type(callback).__mro__}
    wanted = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    found: list[Tracker] = []
    for name, (callback_name, make) in TRACKERS.items():
        if name in wanted or callback_name in classes:
            try:
                found.append(make(args, held))
            except Exception as error:  # no error of a tracker may end the training
                _warn(name, error)
    return Trackers(found)


class Trackers:
    """Logs to every tracker. If a tracker fails, it logs one warning and removes that tracker.

    Args:
        trackers: The trackers. There may be none.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)
        self._readings = ThinnedReadings()
        self._curves = Curves()
        self._alerts = Alerts()
        self._next_snapshot = _FIRST_SNAPSHOT
        self._snapshot_at = 0
        self._can_draw = True

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def report(self, reading: HealthReading) -> None:
        """Log a reading, and after the 4th, 8th, 16th and so on also the table and the heat map."""
        if not self._trackers:
            return
        self._readings.add(reading)
        chosen = self._curves.of(reading)
        self._call(lambda tracker: tracker.report(chosen))
        if self._readings.num_seen >= self._next_snapshot:
            self._next_snapshot = 2 * self._readings.num_seen
            self._log_snapshot()

    def alert(self, record: Record) -> None:
        """Send an alert with advice, if the record is important enough for one."""
        if not self._trackers:
            return
        try:
            alert = self._alerts.of(record)
        except Exception as error:  # the events file contains the record in any case
            logger.warning("PSS cannot describe the event of %s: %s", type(record).__name__, error)
            return
        if alert is not None:
            self._call(lambda tracker: tracker.alert(alert))

    def finish(self) -> None:
        """Log the final table and heat map. A second call does not log them again."""
        if self._snapshot_at < self._readings.num_seen:
            self._log_snapshot()
        self._call(lambda tracker: tracker.finish())

    def _log_snapshot(self) -> None:
        readings = self._readings
        self._snapshot_at = readings.num_seen
        picture = self._draw() if self._trackers and self._can_draw else None
        step = readings.kept[-1].step
        columns = ("step", "matrix", *readings.metrics())

        def log(tracker: Tracker) -> None:
            rows = readings.rows(max_rows=tracker.max_rows)
            tracker.snapshot(Snapshot(step, columns, rows, picture))

        self._call(log)

    def _draw(self) -> Image | None:
        try:
            return draw_heat_map(self._readings)
        except Exception as error:  # neither a missing package nor an odd name may end the training
            self._can_draw = False
            logger.warning(
                "PSS draws no heat map in this run: %s The table has its numbers.", error
            )
            return None

    def _call(self, work: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                work(tracker)
            except Exception as error:  # no error of a tracker may end the training
                self._trackers.remove(tracker)
                _warn(tracker.name, error)


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "PSS stops reporting to %s: %s: %s. Training continues, and the files beside the "
        "checkpoints have everything.",
        name,
        type(error).__name__,
        str(error).rstrip("."),
    )
