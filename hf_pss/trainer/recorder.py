"""Write the events and readings of PSS to the run's folder, to its trackers and to the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_pss.records.events import HealthReading, Intervention, Record, StepReport
from hf_pss.records.messages import InterventionLevels, intervention_line
from hf_pss.records.spikes import SpikeEvidence, spike_line
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE, SPIKES_FILE
from hf_pss.runs.records_files import JsonLines, health_line, reading_line
from hf_pss.trainer.optional import optional_part

logger = logging.getLogger(__name__)


class RunRecorder:
    """Writes the events and health readings of one run.

    Every rank has a recorder, but only that of the first process writes and logs.

    Args:
        args: The Trainer's arguments.
        folder: The run's folder.
        handler: The Trainer's callback handler, which also holds the trackers. Trackers open their
            runs before the first step, so the recorder looks them up at the first record.
        is_first_process: Whether this is the process that writes.
        resumed_step: The step from which the run was resumed, or 0 for a new run. Lines of later
            steps are moved out of the files.
    """

    def __init__(
        self,
        args: TrainingArguments,
        folder: str,
        handler: CallbackHandler,
        *,
        is_first_process: bool,
        resumed_step: int,
    ) -> None:
        self._args, self._folder, self._handler = args, Path(folder), handler
        self.is_first_process = is_first_process
        self._trackers: Any = None
        self.restart(resumed_step=resumed_step)

    def restart(self, *, resumed_step: int) -> None:
        """Begin again at an earlier step. The runs of the trackers stay open."""
        self._first: HealthReading | None = None
        self.last_reading: HealthReading | None = None
        self._levels = InterventionLevels()
        if self.is_first_process:
            self._events = JsonLines(self._folder / EVENTS_FILE, resumed_step=resumed_step)
            self._health = JsonLines(self._folder / HEALTH_FILE, resumed_step=resumed_step)
            self._spikes = JsonLines(self._folder / SPIKES_FILE, resumed_step=resumed_step)

    @property
    def health_summary(self) -> str | None:
        """A table of the matrices by the last reading, worst first, or None without a reading."""
        if self._first is None or self.last_reading is None:
            return None
        table: str = optional_part("summary_table")(self._first, self.last_reading)
        return table

    def write_records(self, records: Sequence[Record]) -> None:
        """Append records to the events file, log interventions and alert the trackers."""
        if not (records and self.is_first_process):
            return
        for record in records:
            if isinstance(record, Intervention):
                line = intervention_line(record)
                logger.log(self._levels.of(record), "%s More in %s.", line, EVENTS_FILE)
        self._events.write_records(records)
        for record in records:
            self._open_trackers().alert(record)

    def write_evidence(self, evidence: SpikeEvidence) -> None:
        """Append the evidence of a spike to its file."""
        self._spikes.write([spike_line(evidence)])

    def write_stable_ranks(self, step: int, ranks: Mapping[str, float]) -> None:
        """Append the stable rank of every matrix to the health file."""
        if self.is_first_process:
            self._health.write([health_line(step, ranks)])

    def write_reading(self, reading: HealthReading) -> None:
        """Append a health reading to the health file and send it to the trackers."""
        self._first = self._first or reading
        self.last_reading = reading
        if self.is_first_process:
            self._health.write([reading_line(reading)])
            self._open_trackers().report(reading)

    def close(self, report: StepReport | None) -> None:
        """Log a summary and finish the trackers."""
        if not self.is_first_process:
            return
        try:
            if (summary := self.health_summary) is not None:
                logger.info("%s", summary)
        except Exception as error:  # a summary must not end a run
            logger.warning("PSS cannot summarize the model's health: %s", error)
        if self._trackers is not None:
            self._trackers.finish()
        if report is not None:
            health = report.scalars.get("health_seconds")
            logger.info(
                "PSS: %d interventions, %d non-finite steps, %.2f s%s.",
                report.scalars["interventions"],
                report.scalars["nonfinite_steps"],
                report.scalars["seconds"],
                "" if health is None else f", and {health:.2f} s for health",
            )

    def _open_trackers(self) -> Any:
        if self._trackers is None:
            make = optional_part("trackers_for")
            self._trackers = make(self._args, self._handler.callbacks)
        return self._trackers
