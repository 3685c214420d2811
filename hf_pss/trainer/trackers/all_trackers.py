"""Combine all trackers of a run in one object that never raises an exception."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from transformers import TrainerCallback, TrainingArguments

from hf_pss.records.events import HealthReading, Record
from hf_pss.records.messages import Alerts
from hf_pss.trainer.trackers.row_trackers import TrackioTracker, WandbTracker
from hf_pss.trainer.trackers.tensorboard_tracker import TensorBoardTracker
from hf_pss.trainer.trackers.tracker import Curves, Image, Snapshot, ThinnedReadings, Tracker

__all__ = ["TRACKERS", "Trackers", "draw_heat_map", "trackers_for"]

logger = logging.getLogger(__name__)

Maker = Callable[[TrainingArguments, Sequence[TrainerCallback]], Tracker]

TRACKERS: Mapping[str, tuple[str, Maker]] = MappingProxyType(
    {
        "wandb": ("WandbCallback", WandbTracker.of),
        "tensorboard": ("TensorBoardCallback", TensorBoardTracker.of),
        "trackio": ("TrackioCallback", TrackioTracker.of),
    }
)
"""For each name in ``report_to``, the Trainer's callback class and a function that
makes a tracker."""

# A snapshot follows when the number of readings has doubled. The last snapshot of a killed run
# therefore lacks at most half of the readings. pss_health.jsonl holds all of them.
_FIRST_SNAPSHOT = 4
_NOT_FINITE_COLOUR = "#D55E00"


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

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the trackers that still work."""
        return tuple(tracker.name for tracker in self._trackers)

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
        self._snapshot_at = self._readings.num_seen
        picture = self._draw() if self._trackers else None
        step = self._readings.kept[-1].step
        columns = ("step", "matrix", *self._readings.metrics())

        def log(tracker: Tracker) -> None:
            rows = self._readings.rows(max_rows=tracker.max_rows)
            tracker.snapshot(Snapshot(step, columns, rows, picture))

        self._call(log)

    def _draw(self) -> Image | None:
        if not self._can_draw:
            return None
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


def draw_heat_map(readings: ThinnedReadings) -> Image | None:
    """Draw the stable rank of every matrix as a heat map.

    Rows are matrices in the order of their blocks, and columns are steps. NaN is orange. Drawing 72
    matrices at 100 steps takes 0.34 s on one core, or 1.5 s with the import of matplotlib.

    Returns:
        The picture, or None if no reading has a stable rank.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from hf_pss.view.heat_map import HeatMapPanel, heat_map_figure

    kept = [one for one in readings.kept if "stable_rank" in one.matrices]
    ranks = [one.matrices["stable_rank"] for one in kept]
    names = tuple(dict.fromkeys(name for by_name in ranks for name in by_name))
    values = [[by_name.get(name, np.nan) for name in names] for by_name in ranks]
    panel = HeatMapPanel(
        title="stable rank, matrices by block, experts at their lowest; "
        "orange: not finite, or not read",
        steps=np.array([one.step for one in kept], dtype=np.float64),
        names=names,
        values=np.array(values, dtype=np.float64).reshape(len(ranks), len(names)),
    )
    figure = heat_map_figure([panel])
    if figure is None:
        return None
    figure.axes[0].set_facecolor(_NOT_FINITE_COLOUR)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "PSS stops reporting to %s: %s: %s. Training continues, and the files beside the "
        "checkpoints have everything.",
        name,
        type(error).__name__,
        str(error).rstrip("."),
    )
