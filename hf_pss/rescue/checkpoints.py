"""The checkpoints of a run's folder: what each holds, and whether it is fit to go on from.

A checkpoint is *complete* where everything that a resumed Trainer reads is there and written to its
end, by the rule of a resume (`hf_pss.integration.checkpoints.judge`). No pickle is opened.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.inspection.checkpoint import open_checkpoint
from hf_pss.inspection.names import visible
from hf_pss.inspection.survey import Inspection, Progress, inspect_checkpoint
from hf_pss.integration.checkpoints.judge import (
    Layout,
    checkpoints_by_step,
    layout_of,
    step_by_name,
    unfit_files,
)
from hf_pss.integration.checkpoints.marker import MARKER, read_marker
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import STATE_FILE, read_history

__all__ = [
    "CheckpointReport",
    "Verdict",
    "checkpoint_folders",
    "judged",
    "num_weight_bytes",
    "rank_ratios",
    "report_on",
]

Verdict: TypeAlias = Literal["healthy", "unopened", "suspect", "incomplete", "damaged"]

_MAX_FILES = 10_000
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What was found in one checkpoint."""

    path: Path
    step: int
    """By its name."""
    written: datetime
    """When its newest file was, in UTC."""
    num_bytes: int
    layout: Layout
    missing: tuple[str, ...]
    """What a resumed Trainer would lack; empty where it is complete."""
    problem: str | None
    """Why its weights are no weights to go on from, or could not be read."""
    inspection: Inspection | None
    """None where no weights could be opened."""
    remarks: tuple[str, ...] = ()
    verdict: Verdict = "healthy"

    @property
    def is_usable(self) -> bool:
        """Whether a Trainer can resume from it, as far as was looked."""
        return not self.missing and self.problem is None

    @property
    def worst(self) -> str:
        """The matrix that most speaks against, and why; empty where nothing does."""
        if self.inspection is None or not self.inspection.matrices:
            return ""
        one = self.inspection.matrices[0]
        return f"{visible(one.health.name)}: {one.findings[0].text}" if one.findings else ""


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, or the one that `run_dir` itself is, by their step.

    Raises:
        ConfigurationError: No such folder.
        OSError: It cannot be read.
    """
    if not run_dir.is_dir():
        raise ConfigurationError(f"There is no folder {visible(run_dir)}. Give a run's folder.")
    is_one = step_by_name(run_dir.resolve()) is not None
    return checkpoints_by_step(run_dir) or ([run_dir] if is_one else [])


def num_weight_bytes(folders: Sequence[Path]) -> int:
    """Return how many bytes of weights `report_on` will read: for a progress bar."""
    total = 0
    for folder in folders:
        try:
            total += open_checkpoint(folder).num_bytes
        except (PSSError, OSError):
            continue
    return total


def report_on(folder: Path, progress: Progress | None = None) -> CheckpointReport:
    """Look into one checkpoint; cost: its safetensors are read once, as by `inspect_checkpoint`.

    Never raises for what is wrong with the checkpoint: the report says so.
    """
    layout = layout_of(folder)
    remarks: list[str] = []
    problem, inspection = None, None
    try:
        inspection = inspect_checkpoint(open_checkpoint(folder), progress=progress)
        problem = _nonfinite(inspection)
    except ConfigurationError as error:  # no safetensors
        if layout in ("whole", "none"):
            problem = str(error)
        else:
            remarks.append("its weights are pickles, which were not opened")
    except PSSError as error:
        problem = str(error)
    except OSError as error:
        problem = f"its weights cannot be read: {visible(error.strerror)}"
    if inspection is not None and layout not in ("whole", "none"):
        remarks.append("judged by the safetensors beside the pickles that the Trainer resumes from")
    if not any(folder.glob("rng_state*.pth")):
        remarks.append("no random state: dropout differs after a resume")
    size, newest = _size_and_time(folder)
    return CheckpointReport(
        path=folder,
        step=_step_of(folder),
        written=newest,
        num_bytes=size,
        layout=layout,
        missing=tuple(_missing(folder)),
        problem=problem,
        inspection=inspection,
        remarks=tuple(remarks),
    )


def judged(
    reports: Sequence[CheckpointReport], failure: Failure | None
) -> tuple[CheckpointReport, ...]:
    """Return the reports with a verdict each, the oldest first."""

    def verdict(one: CheckpointReport) -> Verdict:
        if one.problem is not None:
            return "damaged"
        if one.missing:
            return "incomplete"
        if failure is not None and one.step >= failure.onset_step:
            return "suspect"
        return "unopened" if one.inspection is None else "healthy"

    ordered = sorted(reports, key=lambda one: one.step)
    return tuple(replace(one, verdict=verdict(one)) for one in ordered)


def rank_ratios(reports: Sequence[CheckpointReport]) -> tuple[tuple[int, float], ...]:
    """Return (step, median stable rank over that in the first finite checkpoint), by step."""
    first: dict[str, float] = {}
    found = []
    for one in sorted(reports, key=lambda report: report.step):
        if one.inspection is None or one.problem is not None:
            continue
        healths = [judged_one.health for judged_one in one.inspection.matrices]
        ranks = {health.name: health.stable_rank for health in healths if health.stable_rank > 0}
        first = first or ranks
        ratios = [rank / first[name] for name, rank in ranks.items() if name in first]
        if ratios:
            found.append((one.step, statistics.median(ratios)))
    return tuple(found)


def _step_of(folder: Path) -> int:
    step = step_by_name(folder)
    return (step_by_name(folder.resolve()) or 0) if step is None else step


def _missing(folder: Path) -> Iterator[str]:
    try:
        step = read_history(folder / STATE_FILE).global_step
        if step != _step_of(folder):
            yield f"{STATE_FILE} is of step {step}"
    except (PSSError, OSError) as error:
        there = (folder / STATE_FILE).exists()
        yield f"{STATE_FILE} ({_reason(error)})" if there else f"{STATE_FILE} is missing"
    marker = None
    try:
        marker = read_marker(folder)
    except (PSSError, OSError) as error:
        yield f"{MARKER} ({_reason(error)})"
    try:
        wrong = unfit_files(folder, marker)
    except OSError as error:
        yield f"its files cannot be read: {_reason(error)}"
        return
    wrong.pop(STATE_FILE, None)
    yield from (f"{visible(name)} {why}" for name, why in list(wrong.items())[:_MOST_NAMED])


def _nonfinite(inspection: Inspection) -> str | None:
    if inspection.is_finite:
        return None
    bad = [one.health.name for one in inspection.matrices if one.health.num_nonfinite]
    bad += [entry.name for entry, _ in inspection.bad_others]
    return f"NaN or inf in {len(bad)} of its tensors, {visible(bad[0])} among them"


def _size_and_time(folder: Path) -> tuple[int, datetime]:
    size, newest = 0, folder.stat().st_mtime
    for number, path in enumerate(folder.rglob("*")):
        if number >= _MAX_FILES:
            break
        if path.is_file() and not path.is_symlink():
            found = path.stat()
            size, newest = size + found.st_size, max(newest, found.st_mtime)
    return size, datetime.fromtimestamp(newest, tz=UTC)


def _reason(error: Exception) -> str:
    return visible(error.strerror if isinstance(error, OSError) else error)
