"""All trackers of a run behind one face that never raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from transformers import TrainerCallback, TrainingArguments

from hf_pss.records.events import Record
from hf_pss.records.messages import Alerts
from hf_pss.records.steps import HealthReading
from hf_pss.trainer.trackers.stable_rank_image import heat_map
from hf_pss.trainer.trackers.tensorboard_tracker import TensorBoardReporter
from hf_pss.trainer.trackers.tracker import Curves, Image, Reporter, Snapshot, ThinnedReadings
from hf_pss.trainer.trackers.trackio_tracker import TrackioReporter
from hf_pss.trainer.trackers.wandb_tracker import WandbReporter

__all__ = ["TRACKERS", "Reporters", "reporters_for"]

logger = logging.getLogger(__name__)

Maker = Callable[[TrainingArguments, Sequence[TrainerCallback]], Reporter]

TRACKERS: Mapping[str, tuple[str, Maker]] = MappingProxyType(
    {
        "wandb": ("WandbCallback", WandbReporter.of),
        "tensorboard": ("TensorBoardCallback", TensorBoardReporter.of),
        "trackio": ("TrackioCallback", TrackioReporter.of),
    }
)
"""By the name in ``report_to``: the Trainer's callback, and what makes ours."""

# A killed run has lost half of its readings at most from table and map; pss_health.jsonl has all.
_FIRST_SNAPSHOT = 4


def reporters_for(args: TrainingArguments, callbacks: Iterable[TrainerCallback] = ()) -> Reporters:
    """Return reporters for the trackers that the Trainer uses.

    Call it in ``on_train_begin``, on the first process only, after the Trainer's own callbacks
    have opened their runs: a user's callback comes after them.

    Args:
        args: ``report_to`` names the trackers.
        callbacks: The Trainer's; they are trackers' too where ``report_to`` is silent, and
            TensorBoard's lends its writer. Without it TensorBoard gets a folder of our own.
    """
    held = tuple(callbacks)
    classes = {cls.__name__ for callback in held for cls in type(callback).__mro__}
    wanted = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    found: list[Reporter] = []
    for name, (callback_name, make) in TRACKERS.items():
        if name in wanted or callback_name in classes:
            try:
                found.append(make(args, held))
            except Exception as error:  # whatever a tracker raises, training goes on
                _warn(name, error)
    return Reporters(found)


class Reporters:
    """Tells every tracker, and switches off one that fails: one warning, and training goes on.

    Args:
        reporters: Any number, none included.
    """

    def __init__(self, reporters: Iterable[Reporter]) -> None:
        self._reporters = list(reporters)
        self._history = ThinnedReadings()
        self._curves = Curves()
        self._alerts = Alerts()
        self._next_snapshot = _FIRST_SNAPSHOT
        self._snapshot_at = 0
        self._can_draw = True

    def __bool__(self) -> bool:
        return bool(self._reporters)

    @property
    def names(self) -> tuple[str, ...]:
        """Trackers that are told."""
        return tuple(reporter.name for reporter in self._reporters)

    def report(self, reading: HealthReading) -> None:
        """Log a reading; with the 4th, 8th, 16th and so on also table and heat map so far."""
        if not self._reporters:
            return
        self._history.add(reading)
        told = self._curves.of(reading)
        self._tell(lambda reporter: reporter.report(told))
        if self._history.num_seen >= self._next_snapshot:
            self._next_snapshot = 2 * self._history.num_seen
            self._log_snapshot()

    def alert(self, record: Record) -> None:
        """Raise an alert with the advice to take, where the record is worth one."""
        if not self._reporters:
            return
        try:
            alert = self._alerts.of(record)
        except Exception as error:  # a record without words is in the file all the same
            logger.warning("PSS has no words for the event of %s: %s", type(record).__name__, error)
            return
        if alert is not None:
            self._tell(lambda reporter: reporter.alert(alert))

    def finish(self) -> None:
        """Log the run's table and heat map. May be called again; nothing is logged twice."""
        if self._snapshot_at < self._history.num_seen:
            self._log_snapshot()
        self._tell(lambda reporter: reporter.finish())

    def _log_snapshot(self) -> None:
        self._snapshot_at = self._history.num_seen
        picture = self._draw() if self._reporters else None
        step = self._history.readings[-1].step
        columns = ("step", "matrix", *self._history.metrics())

        def tell(reporter: Reporter) -> None:
            rows = self._history.rows(max_rows=reporter.max_rows)
            reporter.snapshot(Snapshot(step, columns, rows, picture))

        self._tell(tell)

    def _draw(self) -> Image | None:
        if not self._can_draw:
            return None
        try:
            return heat_map(self._history)
        except Exception as error:  # a missing package, an odd name: never the run's end
            self._can_draw = False
            logger.warning(
                "PSS draws no heat map in this run: %s The table has its numbers.", error
            )
            return None

    def _tell(self, what: Callable[[Reporter], None]) -> None:
        for reporter in tuple(self._reporters):
            try:
                what(reporter)
            except Exception as error:  # whatever a tracker raises, training goes on
                self._reporters.remove(reporter)
                _warn(reporter.name, error)


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "PSS reports nothing more to %s: %s: %s. Training goes on; %s",
        name,
        type(error).__name__,
        str(error).rstrip("."),
        "the files beside the checkpoints have everything.",
    )
