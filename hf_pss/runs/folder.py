"""The names and size limits of the files in a run's folder, and the names of its checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = [
    "ABANDONED",
    "EVENTS_FILE",
    "HEALTH_FILE",
    "MARKER",
    "MAX_CONFIG_BYTES",
    "MAX_FILES",
    "MAX_INDEX_BYTES",
    "MAX_LINES_BYTES",
    "MAX_LINE_BYTES",
    "MAX_STATE_BYTES",
    "METRICS_FILE",
    "OPTIONS_FILE",
    "STAGING",
    "STATE_FILE",
    "SUMMARY_FILE",
    "SUPERSEDED",
    "checkpoints_by_step",
    "leads_out",
    "step_by_name",
]

# Written by the Trainer into the run's folder and into each checkpoint.
STATE_FILE = "trainer_state.json"
# Written by PSS beside the checkpoints.
EVENTS_FILE, HEALTH_FILE = "pss_events.jsonl", "pss_health.jsonl"
# Written by `hf-pss train`, and copied into a checkpoint by `hf-pss rescue --write`.
OPTIONS_FILE = "hf_pss_options.json"
# Written by a run of `hf-pss demo`.
METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"

# The last file that is written into a checkpoint: see `hf_pss.runs.checkpoint.Marker`.
MARKER = "pss_complete.json"
# An empty file in a checkpoint. It disappears with the folder when the step is saved again.
SUPERSEDED = "pss_superseded"

# A checkpoint is written here and then renamed. The Trainer ignores such a name when it
# rotates checkpoints and when it resumes, and uploads to the Hub leave out names that begin
# with an underscore.
STAGING = "_pss_saving"
# Holds the checkpoints that were saved after interventions began to fail. No resume looks here.
ABANDONED = "_pss_abandoned"

# A file above its limit is not opened. Parsed JSON takes up to 25 times the memory of its text.
# A logged row takes 200 bytes, with PSS's numbers 600, so this holds 400,000 rows.
MAX_STATE_BYTES = 2**28
# Readers of JSON-lines files take one line at a time and stop at this limit, which is ten times the
# size of a long run's file. An intervention on 1,000 matrices takes 300 kB.
MAX_LINES_BYTES = 2**30
MAX_LINE_BYTES = 16 * 2**20
# The index of a model of 90,000 tensors takes 9 MB. The marker of 10,000 ranks takes less.
MAX_INDEX_BYTES = 32 * 2**20
# A config.json or an options file takes a few thousand bytes.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_FILES = 10_000

# The pattern is that of transformers, but it allows only ASCII digits, and at most as many as a
# step can have.
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")


def step_by_name(folder: Path) -> int | None:
    """Return the N of ``checkpoint-N``, or None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_by_step(run_dir: Path) -> list[Path]:
    """Return all ``checkpoint-N`` folders of a run, including damaged ones, sorted by N."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if step_by_name(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (step_by_name(path) or 0, path.name))


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path is outside of a folder after all links are followed."""
    # `os.path.realpath` is used because `Path.resolve` raises an error if links form a circle.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
