"""The checkpoints of a run's folder: what each holds, and whether it is fit to go on from.

A checkpoint is *complete* where everything that a resumed Trainer reads is there and written to its
end, by the rule of a resume (`hf_pss.runs.checkpoint`). No pickle is opened, and
nothing of a checkpoint in which a link leads out of it.

Which checkpoint to go on from, and why no newer one.

The rule is ours: the newest complete one with finite weights, at least a margin before the onset of
the failure, for the log's medians lag behind what has happened. The margin is 20 steps, how far
back rolling back recovered severe damage (docs/evidence, rescue), or one interval of the log where
that is longer. Where nothing lies that far back: the newest before the onset; where nothing does
either, the oldest after it, as the last resort.
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
from hf_pss.inspection.matrix_survey import Inspection, Progress, inspect_checkpoint
from hf_pss.records.strict_json import visible
from hf_pss.rescue.diagnosis import Failure
from hf_pss.runs.checkpoint import (
    MARKER,
    Layout,
    checkpoints_by_step,
    layout_of,
    read_marker,
    step_by_name,
    unfit_files,
)
from hf_pss.runs.log import STATE_FILE, leads_out, read_history
from hf_pss.runs.rotation import is_superseded
from hf_pss.runs.safetensors_files import Checkpoint, open_checkpoint

__all__ = [
    "DEFAULT_MARGIN_STEPS",
    "CheckpointReport",
    "Choice",
    "Verdict",
    "checkpoint_folders",
    "choose",
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


DEFAULT_MARGIN_STEPS = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to go on from."""

    chosen: CheckpointReport | None
    reason: str
    passed_over: tuple[tuple[CheckpointReport, str], ...]
    """Newer ones, the newest first, each with why it was not taken; all, where none was chosen."""
    is_last_resort: bool = False
    """Whether it was written after the failure began."""


def choose(
    reports: Sequence[CheckpointReport], failure: Failure | None, *, margin_steps: int
) -> Choice:
    """Choose among judged reports.

    Args:
        reports: All checkpoints of the run.
        failure: None where none was found: then the newest usable one is taken.
        margin_steps: See above.
    """
    usable = [one for one in reports if one.is_usable]
    usable = [one for one in usable if not one.is_superseded] or usable
    if not usable:
        why = "none is complete and finite" if reports else "there is none"
        return Choice(None, f"No checkpoint to go on from: {why}.", _passed(reports, None, failure))
    newest = max(usable, key=_step)
    if failure is None:
        reason = f"the newest that is complete; no failure was found{_caveat(newest)}"
        return Choice(newest, reason, _passed(reports, newest, failure))
    before = [one for one in usable if one.step < failure.onset_step]
    far = [one for one in before if one.step <= failure.onset_step - 1 - margin_steps]
    if far or before:
        chosen = max(far or before, key=_step)
        distance = failure.onset_step - chosen.step
        reason = f"complete, and {distance} steps before the failure began"
        if far:
            reason += f" (the margin is {margin_steps})"
        else:
            reason += f": less than the margin of {margin_steps}, but there is no older one"
        reason += _caveat(chosen)
        return Choice(chosen, reason, _passed(reports, chosen, failure, margin_steps))
    chosen = min(usable, key=_step)
    reason = (
        f"the last resort: written {chosen.step - failure.onset_step} steps after the failure "
        "began, and no usable one is older. Its weights may be damaged"
    )
    return Choice(chosen, reason, _passed(reports, chosen, failure), is_last_resort=True)


def _passed(
    reports: Sequence[CheckpointReport],
    chosen: CheckpointReport | None,
    failure: Failure | None,
    margin_steps: int = 0,
) -> tuple[tuple[CheckpointReport, str], ...]:
    least = -1 if chosen is None else chosen.step
    newer = [one for one in reports if one.step > least]
    return tuple(
        (one, _why_not(one, failure, margin_steps))
        for one in sorted(newer, key=_step, reverse=True)
    )


def _why_not(one: CheckpointReport, failure: Failure | None, margin_steps: int) -> str:
    if one.problem is not None:
        return one.problem
    if one.missing:
        return "; ".join(one.missing)
    if one.is_superseded:
        return "of an earlier run in this folder"
    if failure is not None and one.step >= failure.onset_step:
        return f"written after the failure began (step {failure.onset_step})"
    return f"within {margin_steps} steps of the failure"


def _caveat(one: CheckpointReport) -> str:
    return "" if one.inspection is not None else "; its weights were not opened: see for yourself"


def _step(one: CheckpointReport) -> int:
    return one.step
