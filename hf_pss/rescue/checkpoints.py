"""The checkpoints of a run's folder: what each holds, and whether it is fit to go on from.

A checkpoint is *complete* where everything that a resumed Trainer reads is there and written to its
end, by the rule of a resume (`hf_pss.integration.checkpoints.judge`). No pickle is opened, and
nothing of a checkpoint in which a link leads out of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.inspection.checkpoint import Checkpoint, open_checkpoint
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
from hf_pss.integration.checkpoints.rotation import is_superseded
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import STATE_FILE, leads_out, read_history

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
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_ADAPTERS = "*/*.safetensors"
_LATEST = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()
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
    is_superseded: bool = False
    """Whether it is of an earlier run: another has begun anew in the folder, and has saved."""
    verdict: Verdict = "healthy"

    @property
    def is_adapter(self) -> bool:
        """Whether its weights are those of PEFT adapters."""
        return any(True for at in ("", "*/") for _ in self.path.glob(f"{at}adapter_config.json"))

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
    own = run_dir.resolve() if run_dir.is_symlink() else run_dir  # named, so it may lie anywhere
    return checkpoints_by_step(run_dir) or ([own] if is_one else [])


def num_weight_bytes(folders: Sequence[Path]) -> int:
    """Return how many bytes of weights `report_on` will read: for a progress bar."""
    total = 0
    for folder in folders:
        try:
            total += 0 if _link_out(folder) else _open(folder).num_bytes
        except (PSSError, OSError):
            continue
    return total


def report_on(folder: Path, progress: Progress | None = None) -> CheckpointReport:
    """Look into one checkpoint; cost: its safetensors are read once, as by `inspect_checkpoint`.

    Never raises for what is wrong with the checkpoint: the report says so. Where a link in it leads
    out of it, nothing in it is opened.
    """
    size, newest = _size_and_time(folder)
    report = CheckpointReport(
        path=folder,
        step=_step_of(folder),
        written=newest,
        num_bytes=size,
        layout=layout_of(folder),
        missing=(),
        problem=None,
        inspection=None,
    )
    if (link := _link_out(folder)) is not None:
        return replace(report, problem=f"{visible(link)} is a link that leads out: not opened")
    problem, inspection, remarks = _weights_of(folder, report.layout, progress)
    if not any(folder.glob("rng_state*.pth")):
        remarks.append("no random state: dropout differs after a resume")
    if superseded := is_superseded(folder):
        remarks.append("of an earlier run in this folder")
    return replace(
        report,
        is_superseded=superseded,
        missing=tuple(_missing(folder)),
        problem=problem,
        inspection=inspection,
        remarks=tuple(remarks),
    )


def _weights_of(
    folder: Path, layout: Layout, progress: Progress | None
) -> tuple[str | None, Inspection | None, list[str]]:
    """Return what is wrong with the weights, what was measured of them, and remarks."""
    is_pickled = layout not in ("whole", "none")
    try:
        inspection = inspect_checkpoint(_open(folder), progress=progress)
    except ConfigurationError as error:  # no safetensors
        if is_pickled or any(any(folder.glob(name)) for name in _PICKLED_WEIGHTS):
            return None, None, ["its weights are pickles, which were not opened"]
        return str(error), None, []
    except PSSError as error:
        return str(error), None, []
    except OSError as error:
        return f"its weights cannot be read: {visible(error.strerror)}", None, []
    beside = "judged by the safetensors beside the pickles that the Trainer resumes from"
    return _nonfinite(inspection), inspection, [beside] if is_pickled else []


def _open(folder: Path) -> Checkpoint:
    """Open a checkpoint, or the adapters that it keeps, each in a folder of its own."""
    try:
        return open_checkpoint(folder)
    except ConfigurationError:
        adapters = [open_checkpoint(path) for path in sorted(folder.glob(_ADAPTERS))]
        if not adapters:
            raise
    tensors = tuple(
        replace(entry, name=f"{entry.path.parent.name}/{entry.name}")
        for one in adapters
        for entry in one.tensors
    )
    return Checkpoint(folder, tensors, {})


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
    # Files may be of the year 30,000, which `datetime` does not know.
    return size, datetime.fromtimestamp(min(max(newest, 0.0), _LATEST), tz=UTC)


def _link_out(folder: Path) -> str | None:
    """Name a link in a checkpoint that leads out of it, or the checkpoint itself, out of its run.

    None where there is none.
    """
    if leads_out(folder, folder.parent):
        return folder.name
    paths = islice(folder.rglob("*"), _MAX_FILES)
    found = (path for path in paths if path.is_symlink() and leads_out(path, folder))
    return next((path.relative_to(folder).as_posix() for path in found), None)


def _reason(error: Exception) -> str:
    return visible(error.strerror if isinstance(error, OSError) else error)
