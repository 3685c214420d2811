"""Output to the run's trackers beside its log: health, spectra, heat map, table and alerts.

`trackers_for` finds the trackers that the Trainer itself uses. A new tracker is one class with the
methods of `Tracker` and one row of `TRACKERS`.
"""

from __future__ import annotations

from hf_pss.trainer.trackers.all_trackers import TRACKERS as TRACKERS
from hf_pss.trainer.trackers.all_trackers import Trackers as Trackers
from hf_pss.trainer.trackers.all_trackers import trackers_for as trackers_for
from hf_pss.trainer.trackers.summary import summary_table as summary_table
from hf_pss.trainer.trackers.tracker import Tracker as Tracker
