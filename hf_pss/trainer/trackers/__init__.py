"""What goes to the run's tracker beside its log: health, spectra, heat map, table and alerts.

`reporters_for` finds the trackers that the Trainer itself uses. A new tracker is one class with the
four methods of `Reporter` and one row of `TRACKERS`.
"""

from __future__ import annotations

from hf_pss.trainer.trackers.fan_out import TRACKERS as TRACKERS
from hf_pss.trainer.trackers.fan_out import Reporters as Reporters
from hf_pss.trainer.trackers.fan_out import reporters_for as reporters_for
from hf_pss.trainer.trackers.summary import summary_table as summary_table
from hf_pss.trainer.trackers.tracker import Reporter as Reporter

__all__ = ["TRACKERS", "Reporter", "Reporters", "reporters_for", "summary_table"]
