"""Report health numbers, spectra, heat maps, tables and alerts to the trackers of a run.

`trackers_for` finds the trackers that the Trainer itself uses. To add a tracker, write one class
with the methods of `Tracker` and add one row to `TRACKERS`.
"""

from __future__ import annotations

from hf_pss.trainer.trackers.all_trackers import TRACKERS as TRACKERS
from hf_pss.trainer.trackers.all_trackers import Trackers as Trackers
from hf_pss.trainer.trackers.all_trackers import trackers_for as trackers_for
from hf_pss.trainer.trackers.summary import summary_table as summary_table
from hf_pss.trainer.trackers.tracker import Tracker as Tracker
