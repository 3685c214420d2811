"""The checkpoints of a run's folder: what each holds, and whether it is fit to go on from.

A checkpoint is *complete* where everything that a resumed Trainer reads is there and written to its
end. Pickles are not opened: of a .pt file that torch wrote, a ZIP archive, the beginning and the
end are looked at, which a file that was cut short has not both.
"""

from __future__ import annotations

import re
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
from hf_pss.integration.checkpoints.marker import MARKER, changed_files, read_marker
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import STATE_FILE, read_history

__all__ = [
    "CheckpointReport",
    "Layout",
    "Verdict",
    "checkpoint_folders",
    "judged",
    "num_weight_bytes",
    "rank_ratios",
    "report_on",
]

Layout: TypeAlias = Literal["whole", "fsdp_full", "fsdp_sharded", "deepspeed", "none"]
Verdict: TypeAlias = Literal["healthy", "unopened", "suspect", "incomplete", "damaged"]

# As in transformers; ASCII digits, and no more than a step has.
_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_ZIP_BEGINS, _ZIP_ENDS = b"PK\x03\x04", b"PK\x05\x06"
_END_RECORD_BYTES = 22
_MAX_FILES = 10_000
_MOST_NAMED = 5
# Beside model.safetensors, by the layout that the Trainer resumes from.
_OPTIMIZERS = {"whole": ("optimizer.pt",), "fsdp_full": ("optimizer.bin",)}


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
    found = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    if not found and _NAME.fullmatch(run_dir.resolve().name):
        found = [run_dir]
    return sorted(found, key=_step_of)


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
    layout = _layout(folder)
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
        missing=tuple(_missing(folder, layout)),
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
    match = _NAME.fullmatch(folder.name) or _NAME.fullmatch(folder.resolve().name)
    return int(match[1]) if match else 0


def _layout(folder: Path) -> Layout:
    if any(folder.glob("global_step*")):
        return "deepspeed"
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return "fsdp_sharded"
    if (folder / "pytorch_model_fsdp.bin").exists():
        return "fsdp_full"
    return "whole" if any(folder.glob("*.safetensors*")) else "none"


def _missing(folder: Path, layout: Layout) -> Iterator[str]:
    try:
        step = read_history(folder / STATE_FILE).global_step
        if step != _step_of(folder):
            yield f"{STATE_FILE} is of step {step}"
    except (PSSError, OSError) as error:
        there = (folder / STATE_FILE).exists()
        yield f"{STATE_FILE} ({_reason(error)})" if there else f"{STATE_FILE} is missing"
    yield from _unlike_its_marker(folder)
    needed = (*_OPTIMIZERS.get(layout, ()), "scheduler.pt")
    yield from _bad_files(folder, needed)
    if layout == "fsdp_full":
        yield from _bad_files(folder, ("pytorch_model_fsdp.bin",))
    if layout == "fsdp_sharded":
        yield from _bad_files(folder, ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"))
    if layout == "deepspeed":
        yield from _bad_files(folder, ("latest",))
        if not any(path.is_file() for path in folder.glob("global_step*/*optim_states.pt")):
            yield "the optimizer's states are missing"


def _unlike_its_marker(folder: Path) -> Iterator[str]:
    """What PSS vouched for when it saved, and is no longer so; nothing for a plain Trainer's."""
    try:
        marker = read_marker(folder)
        wrong = {} if marker is None else changed_files(folder, marker)
    except (PSSError, OSError) as error:
        yield f"{MARKER} ({_reason(error)})"
        return
    yield from (f"{visible(name)} {why}" for name, why in list(wrong.items())[:_MOST_NAMED])


def _bad_files(folder: Path, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                yield f"{name} is missing"
            elif not _looks_whole(path):
                yield f"{name} was not written to its end"
        except OSError as error:
            yield f"{name} ({_reason(error)})"


def _looks_whole(path: Path) -> bool:
    """Whether a file has a ZIP archive's beginning and end, or is no archive and not empty."""
    with path.open("rb") as stream:
        beginning = stream.read(len(_ZIP_BEGINS))
        size = stream.seek(0, 2)
        if path.suffix in (".pt", ".bin") and beginning != _ZIP_BEGINS:
            return False  # torch has written archives since 1.6
        if path.suffix not in (".pt", ".bin"):
            return size > 0
        stream.seek(max(0, size - _END_RECORD_BYTES))
        return stream.read(len(_ZIP_ENDS)) == _ZIP_ENDS


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
