"""What PSS itself wrote down beside a run: its events, and the stable ranks of its matrices.

Both files are optional, links that lead out of the folder are not followed, a line that cannot be
read is counted and passed over, and lines are read one at a time with a cap on their size and
number.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_pss.errors import StateError
from hf_pss.records.events import Event, EventKind, Intervention, from_json_line
from hf_pss.records.strict_json import parse_object
from hf_pss.runs.log import leads_out

__all__ = ["EVENTS_FILE", "HEALTH_FILE", "Notes", "read_notes"]

EVENTS_FILE, HEALTH_FILE = "pss_events.jsonl", "pss_health.jsonl"
# An intervention on 1,000 matrices takes 300 kB; the files of a long run some 100 MB.
_MAX_LINE_BYTES = 16 * 2**20
_MOST_RANK = 1e9
_MAX_FILE_BYTES = 1024 * 2**20


@dataclass(frozen=True, slots=True)
class Notes:
    """What PSS saw, in short."""

    events: tuple[Event, ...] = ()
    """By line; those that were answered by smoothing are among them."""
    num_interventions: int = 0
    rank_ratios: tuple[tuple[int, float], ...] = ()
    """(step, median over matrices of stable rank / its own first value)."""
    num_unreadable: int = 0
    """Lines that were passed over."""

    def nonfinite_steps(self) -> tuple[int, ...]:
        """Steps whose loss or gradient was NaN or inf."""
        return tuple(one.step for one in self.events if one.kind is EventKind.NON_FINITE)

    def spike_steps(self) -> tuple[int, ...]:
        """Steps at which a detector of norms fired."""
        return tuple(one.step for one in self.events if one.kind is EventKind.SPIKE)


def read_notes(run_dir: Path) -> Notes:
    """Read both files, as far as they are there."""
    events: list[Event] = []
    num_interventions = num_bad = 0
    for line in _lines(run_dir / EVENTS_FILE):
        try:
            record = from_json_line(line.decode("utf-8"))
        except ValueError:
            num_bad += 1
            continue
        num_interventions += isinstance(record, Intervention) and record.has_changed_weights
        events.append(record.event if isinstance(record, Intervention) else record)
    ratios: list[tuple[int, float]] = []
    first: dict[str, float] = {}
    for line in _lines(run_dir / HEALTH_FILE):
        try:
            step, ranks = _ranks(line)
        except StateError:
            num_bad += 1
            continue
        for name, rank in ranks.items():
            first.setdefault(name, rank)
        found = [rank / first[name] for name, rank in ranks.items()]
        if found:
            ratios.append((step, statistics.median(found)))
    return Notes(tuple(events), num_interventions, tuple(ratios), num_bad)


def _ranks(line: bytes) -> tuple[int, dict[str, float]]:
    row = parse_object(line, what="A line", allow_nonfinite=True)
    step, ranks = row.get("step"), row.get("stable_rank")
    if type(step) is not int or step < 0 or not isinstance(ranks, dict):
        raise StateError("A line holds no step or no stable ranks.")
    kept = {name: rank for name, rank in ranks.items() if isinstance(rank, int | float)}
    return step, {name: float(rank) for name, rank in kept.items() if 0 < rank < _MOST_RANK}


def _lines(path: Path) -> Iterator[bytes]:
    if leads_out(path, path.parent) or not path.is_file():
        return
    with path.open("rb") as stream:
        left = _MAX_FILE_BYTES
        while left > 0 and (line := stream.readline(_MAX_LINE_BYTES)):
            left -= len(line)
            if line.strip():
                yield line
