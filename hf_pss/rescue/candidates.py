"""Measure the checkpoints of a run, and choose the checkpoint to continue from.

We chose the following rule. The chosen checkpoint is the newest complete checkpoint with finite
weights that is at least `margin_steps` older than the onset of the failure. The margin is needed
because the running medians of the log react late. Its default is 20 steps, because going back 20
steps repaired severe damage (docs/experiments.md). The margin is at least one interval of the
log. If no checkpoint is that old, the newest one before the onset is chosen. If there is none
before the onset, the oldest one after it is the last resort.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Literal, TypeAlias

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.health.verdicts import is_ill
from hf_pss.inspection.matrix_survey import Inspection, Progress, inspect_checkpoint
from hf_pss.inspection.measure import MatrixHealth
from hf_pss.linalg.smoothing import looks_trained
from hf_pss.models.selection.by_name import is_adapter_factor
from hf_pss.records.strict_json import reason_of, visible
from hf_pss.rescue.diagnosis import RunFailure
from hf_pss.runs.checkpoint import (
    Layout,
    examine,
    has_pickled_weights,
    is_superseded,
    layout_of,
    open_weights,
    recorded_step,
)
from hf_pss.runs.folder import (
    MAX_FILES,
    STATE_FILE,
    checkpoints_by_step,
    leads_out,
    step_by_name,
)
from hf_pss.view.numbers import plural

CheckpointVerdict: TypeAlias = Literal["healthy", "unopened", "suspect", "incomplete", "damaged"]

_LATEST = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()
_STEP = attrgetter("step")
_OF_EARLIER_RUN = "of an earlier run in this folder"


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """The measurements of one checkpoint."""

    path: Path
    step: int
    """The step in the name of the folder. If the name holds none, the step in its state."""
    written: datetime
    """The time of the newest file, in UTC."""
    num_bytes: int
    layout: Layout
    missing: tuple[str, ...] = ()
    """The parts that a resumed Trainer would lack. Empty if the checkpoint is complete."""
    problem: str | None = None
    """The reason why the weights are useless or could not be read, or None."""
    inspection: Inspection | None = None
    """The measurements of the weights, or None if no weights could be opened."""
    remarks: tuple[str, ...] = ()
    has_only_weights: bool = False
    """Whether it was saved without the optimizer's state, as with save_only_model=True."""
    is_superseded: bool = False
    """Whether a later run has started in the same run folder and has saved there."""
    verdict: CheckpointVerdict = "healthy"

    @property
    def is_adapter(self) -> bool:
        """Whether the weights belong to PEFT adapters."""
        return any(True for at in ("", "*/") for _ in self.path.glob(f"{at}adapter_config.json"))

    @property
    def is_usable(self) -> bool:
        """Whether a Trainer can resume from the checkpoint, as far as its files show."""
        return not self.missing and self.problem is None

    @property
    def stable_ranks(self) -> Mapping[str, float]:
        """The stable rank of each matrix. Empty if the weights are not measured or not finite."""
        if self.inspection is None or self.problem is not None:
            return {}
        return {one.health.name: one.health.stable_rank for one in self.inspection.matrices}

    @property
    def selected(self) -> tuple[MatrixHealth, ...]:
        """The matrices that a run would watch and smooth. Empty if the weights are not measured."""
        matrices = () if self.inspection is None else self.inspection.matrices
        return tuple(one.health for one in matrices if not one.health.source.why_unselected)

    @property
    def has_nothing_to_smooth(self) -> bool:
        """Whether the weights are measured, and a run would smooth none of them."""
        if self.inspection is None or self.selected:
            return False
        return not any(is_adapter_factor(one.name) for one in self.inspection.checkpoint.tensors)

    @property
    def may_be_trained(self) -> bool:
        """Whether the stable ranks show training, or are not known."""
        found = self.selected
        shapes = {one.name: one.shape for one in found}
        return not found or looks_trained(shapes, {one.name: one.stable_rank for one in found})

    @property
    def worst(self) -> str:
        """The matrix with the worst finding, and that finding. Empty without findings."""
        if self.inspection is None or not self.inspection.matrices:
            return ""
        one = self.inspection.matrices[0]
        return f"{visible(one.health.name)}: {one.findings[0].text}" if is_ill(one.findings) else ""


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, sorted by step, or `run_dir` if it is a checkpoint itself.

    Raises:
        ConfigurationError: The folder does not exist.
        OSError: The folder cannot be read.
    """
    if not run_dir.is_dir():
        raise ConfigurationError(f"There is no folder {visible(run_dir)}. Give a run's folder.")
    # Callbacks and other libraries write checkpoint-last, checkpoint-best or epoch-3. A run's own
    # folder can hold a state and weights, too. Only a checkpoint also has scheduler.pt.
    is_one = step_by_name(run_dir.resolve()) is not None or (
        (run_dir / STATE_FILE).is_file() and (run_dir / "scheduler.pt").is_file()
    )
    # The user has named this folder, so it may be a link to any place.
    own = run_dir.resolve() if run_dir.is_symlink() else run_dir
    return checkpoints_by_step(run_dir) or ([own] if is_one else [])


def num_weight_bytes(folders: Sequence[Path]) -> int:
    """Return how many bytes of weights `report_on` will read, for a progress bar."""
    total = 0
    for folder in folders:
        try:
            total += 0 if _link_out(folder) else open_weights(folder).num_bytes
        except (PSSError, OSError):
            continue
    return total


Inspected: TypeAlias = dict[frozenset[str], Inspection]
"""The inspections so far, by the real paths of the weight files."""


def report_on(
    folder: Path, progress: Progress | None = None, *, inspected: Inspected | None = None
) -> CheckpointReport:
    """Measure one checkpoint. Its safetensors are read once, by `inspect_checkpoint`.

    Checkpoints whose weights are links to the same files share one inspection in `inspected`.

    The function never raises an exception for a damaged checkpoint, because the report states the
    damage. The same holds for a checkpoint that a live run removes in the meantime. If a link leads
    out of the checkpoint, no file of the checkpoint is opened.
    """
    try:
        return _report_on(folder, progress, {} if inspected is None else inspected)
    except (PSSError, OSError) as error:
        unknown = datetime.fromtimestamp(0, tz=UTC)
        step = step_by_name(folder) or 0
        return CheckpointReport(folder, step, unknown, 0, "none", problem=reason_of(error))


def _report_on(folder: Path, progress: Progress | None, inspected: Inspected) -> CheckpointReport:
    size, newest = _size_and_time(folder)
    report = CheckpointReport(folder, _step_of(folder), newest, size, layout_of(folder))
    if (link := _link_out(folder)) is not None:
        return replace(report, problem=f"{visible(link)} is a link that leads out: not opened")
    problem, inspection, remarks = _weights_of(folder, report.layout, progress, inspected)
    missing, has_only_weights = _missing(folder)
    if has_only_weights:
        remarks.append("only weights (save_only_model): a resume starts a fresh optimizer")
    elif not any(folder.glob("rng_state*.pth")):
        remarks.append("no random state: dropout differs after a resume")
    if superseded := is_superseded(folder):
        remarks.append(_OF_EARLIER_RUN)
    report = replace(report, missing=missing, problem=problem, inspection=inspection)
    report = replace(report, has_only_weights=has_only_weights, is_superseded=superseded)
    return replace(report, remarks=tuple(remarks))


def _weights_of(
    folder: Path, layout: Layout, progress: Progress | None, inspected: Inspected
) -> tuple[str | None, Inspection | None, list[str]]:
    """Return the fault of the weights or None, their measurements, and remarks."""
    is_pickled = layout not in ("whole", "none")
    try:
        weights = open_weights(folder)
        files = frozenset(os.path.realpath(path) for path in {one.path for one in weights.tensors})
        if files not in inspected:
            inspected[files] = inspect_checkpoint(weights, progress=progress)
        inspection = inspected[files]
    except PSSError as error:
        has_pickles = is_pickled or has_pickled_weights(folder)
        if isinstance(error, ConfigurationError) and has_pickles:  # there are no safetensors
            return None, None, ["its weights are pickles, which were not opened"]
        return str(error), None, []
    except OSError as error:
        return f"its weights cannot be read: {reason_of(error)}", None, []
    beside = "judged by the safetensors beside the pickles that the Trainer resumes from"
    problem = None
    if not inspection.is_finite:
        bad = [one.health.name for one in inspection.matrices if one.health.num_nonfinite]
        bad += [entry.name for entry, _ in inspection.bad_others]
        problem = f"NaN or inf in {len(bad)} of its tensors, {visible(bad[0])} among them"
    return problem, inspection, [beside] if is_pickled else []


def _missing(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Return the parts that a checkpoint should have and lacks, and whether it has only weights."""
    found = examine(folder, reads_weights=False)  # the inspection has already read the weights
    if found.problem is not None:
        return (found.problem,), False
    step = recorded_step(folder)
    differs = () if step == _step_of(folder) else (f"{STATE_FILE} was written at step {step}",)
    only = found.has_only_weights
    return (*differs, *(() if only else found.lacks)), only


def judged(
    reports: Sequence[CheckpointReport], failure: RunFailure | None
) -> tuple[CheckpointReport, ...]:
    """Give each report a verdict, and return the reports, oldest first."""

    def verdict(one: CheckpointReport) -> CheckpointVerdict:
        if one.problem is not None:
            return "damaged"
        if one.missing:
            return "incomplete"
        if failure is not None and one.step >= failure.onset_step:
            return "suspect"
        return "unopened" if one.inspection is None else "healthy"

    return tuple(replace(one, verdict=verdict(one)) for one in sorted(reports, key=_STEP))


def _step_of(folder: Path) -> int:
    step = step_by_name(folder)
    step = step_by_name(folder.resolve()) if step is None else step
    if step is not None:
        return step
    try:
        return recorded_step(folder)
    except PSSError:
        return 0


def _size_and_time(folder: Path) -> tuple[int, datetime]:
    size, newest = 0, folder.stat().st_mtime
    for path in islice(folder.rglob("*"), MAX_FILES):
        if path.is_file() and not path.is_symlink():
            found = path.stat()
            size, newest = size + found.st_size, max(newest, found.st_mtime)
    # A file may have a date in the year 30,000, which `datetime` cannot hold.
    return size, datetime.fromtimestamp(min(max(newest, 0.0), _LATEST), tz=UTC)


def _link_out(folder: Path) -> str | None:
    """Return the name of a link that leads out of a checkpoint, or None.

    The folder of the checkpoint may itself be a link.
    """
    if leads_out(folder, folder.parent):
        return folder.name
    paths = islice(folder.rglob("*"), MAX_FILES)
    found = (path for path in paths if path.is_symlink() and leads_out(path, folder))
    return next((path.relative_to(folder).as_posix() for path in found), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to continue from."""

    chosen: CheckpointReport | None
    reason: str
    passed_over: tuple[tuple[CheckpointReport, str], ...]
    """The newer checkpoints, newest first, each with the reason against it. If none was chosen, all
    checkpoints are listed."""
    is_last_resort: bool = False
    """Whether the chosen checkpoint was written after the failure began."""


def choose(
    reports: Sequence[CheckpointReport], failure: RunFailure | None, *, margin_steps: int
) -> Choice:
    """Choose a checkpoint among reports that have a verdict.

    Args:
        reports: The reports on all checkpoints of the run.
        failure: How the run failed. If it is None, the newest usable checkpoint is chosen.
        margin_steps: The margin; see the module's docstring.
    """
    usable = [one for one in reports if one.is_usable]
    usable = [one for one in usable if not one.is_superseded] or usable
    margin, is_last_resort = 0, False
    if not usable:
        chosen = None
        why = "none is complete and finite" if reports else "there is none"
        reason = f"No checkpoint to continue from: {why}."
    elif failure is None:
        chosen = max(usable, key=_STEP)
        reason = "the newest that is complete; no failure was found"
    elif before := [one for one in usable if one.step < failure.onset_step]:
        margin = margin_steps
        far = [one for one in before if one.step <= failure.onset_step - 1 - margin]
        chosen = max(far or before, key=_STEP)
        distance = failure.onset_step - chosen.step
        short = f": less than the margin of {margin}, but no usable checkpoint is that much older"
        reason = f"complete, and {plural(distance, 'step')} before the failure began"
        reason += f" (the margin is {margin})" if far else short
    else:
        chosen, is_last_resort = min(usable, key=_STEP), True
        reason = (
            f"the last resort: written {plural(chosen.step - failure.onset_step, 'step')} after "
            "the failure began, and no usable one is older. Its weights may be damaged"
        )
    if chosen is not None and chosen.inspection is None and not is_last_resort:
        reason += "; its weights were not opened: check them yourself"
    newer = [one for one in reports if chosen is None or one.step > chosen.step]
    passed = [(one, _why_not(one, failure, margin)) for one in sorted(newer, key=_STEP)[::-1]]
    return Choice(chosen, reason, tuple(passed), is_last_resort)


def _why_not(one: CheckpointReport, failure: RunFailure | None, margin_steps: int) -> str:
    if one.problem is not None:
        return one.problem
    if one.missing:
        return "; ".join(one.missing)
    if one.is_superseded:
        return _OF_EARLIER_RUN
    if failure is not None and one.step >= failure.onset_step:
        return f"written after the failure began (step {failure.onset_step})"
    return f"within {plural(margin_steps, 'step')} of the failure"
