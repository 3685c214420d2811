"""What goes to the run's tracker beside its log: health, spectra, heat map, table and alerts.

`reporters_for` finds the trackers that the Trainer itself uses. A new tracker is one class with the
four methods of `Reporter` and one row of `TRACKERS`.
"""

from __future__ import annotations

from hf_pss.integration.reporters.reporter import Reporter as Reporter
from hf_pss.integration.reporters.reporters import TRACKERS as TRACKERS
from hf_pss.integration.reporters.reporters import Reporters as Reporters
from hf_pss.integration.reporters.reporters import reporters_for as reporters_for
from hf_pss.integration.reporters.summary import summary_table as summary_table

__all__ = ["TRACKERS", "Reporter", "Reporters", "reporters_for", "summary_table"]
