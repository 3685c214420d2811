"""Which checkpoints of a folder are of an earlier run, and which go beyond `save_total_limit`.

A run that is begun anew in a folder finds checkpoints of later steps there. Once it has saved one
of its own, those are not its newest, whatever their numbers and the files' times say.

A run's own checkpoints, which are not all that lie in its folder; and what is put out of sight.

These are what it was resumed from, the older ones beside that, and what it has saved since. What
else lies in the folder, an earlier run's, say, is nothing to go back to.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_pss.runs.checkpoint import Examination, checkpoints_by_step, examine, step_by_name

__all__ = [
    "ABANDONED",
    "SUPERSEDED",
    "Lineage",
    "abandon",
    "claim_",
    "is_superseded",
    "rotate",
    "supersede_later_",
]

logger = logging.getLogger(__name__)

# An empty file in the checkpoint; it goes with the folder when the step is saved again.
SUPERSEDED = "pss_superseded"


def is_superseded(folder: Path) -> bool:
    """Tell whether another run has begun anew beside this checkpoint, and has saved."""
    return (folder / SUPERSEDED).exists()


def claim_(folder: Path) -> None:
    """Count a checkpoint among the run that goes on from it."""
    try:
        (folder / SUPERSEDED).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be changed: %s.", folder, error)


def supersede_later_(run_dir: Path, *, step: int) -> None:
    """Let no resume take the checkpoints of steps after the one that was just saved."""
    for folder in checkpoints_by_step(run_dir):
        if (step_by_name(folder) or 0) <= step or is_superseded(folder):
            continue
        logger.warning(
            "%s is of an earlier run, for step %d was saved after it: resume_from_checkpoint=True "
            "will pass it over.",
            folder,
            step,
        )
        try:
            (folder / SUPERSEDED).touch()
        except OSError as error:
            logger.warning("%s cannot be changed, and may be resumed: %s.", folder, error)


def rotate(run_dir: Path, *, limit: int | None, step: int, kept: Collection[str]) -> None:
    """Remove what is beyond the limit: those of an earlier run first, then the oldest.

    Args:
        run_dir: Holds ``checkpoint-N`` folders.
        limit: `save_total_limit`; None or 0 removes nothing.
        step: What was just saved.
        kept: Names that stay, beyond the limit, too.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_by_step(run_dir)
    found.sort(key=lambda folder: (step_by_name(folder) or 0) <= step)  # stable: by step in each
    for folder in [one for one in found if one.name not in kept]:
        if len(found) <= limit:
            return
        logger.info("Removing %s: save_total_limit is %d.", folder, limit)
        shutil.rmtree(folder, ignore_errors=True)
        found.remove(folder)


ABANDONED = "_pss_abandoned"
"""Folder of what was saved after something began to fail; no resume looks there."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Checkpoints in the order in which they were saved; some may have been removed since."""

    folders: tuple[Path, ...] = ()
    source: Path | None = None
    """What the run was resumed from, in whatever folder; None for a run from its start."""

    @classmethod
    def of(cls, source: Path | None) -> Lineage:
        """Return the lineage of a run that is resumed: the checkpoint, and older ones beside it."""
        return cls() if source is None else cls((*_older(source), source), source)

    @property
    def names(self) -> set[str]:
        """The folders' names."""
        return {folder.name for folder in self.folders}

    def with_saved(self, folder: Path) -> Lineage:
        """Return the lineage with what was just saved."""
        return replace(self, folders=(*self.folders, folder))

    def up_to(self, step: int) -> Lineage:
        """Return the lineage without the checkpoints of later steps."""
        return replace(self, folders=tuple(f for f in self.folders if _step_of(f) <= step))

    def newest_before(self, step: int) -> Examination | None:
        """Return the newest whole checkpoint of an earlier step; log which it passes over."""
        for folder in reversed(self.folders):
            if not folder.is_dir():  # rotation took it
                continue
            found = examine(folder)
            if found.step >= step:
                continue
            if found.is_whole:
                return found
            logger.warning("%s is passed over: %s.", folder, found.why_not)
        return None

    def name_before(self, step: int) -> str | None:
        """Return the name of the last checkpoint before a step, whole or not."""
        before = [folder.name for folder in self.folders if _step_of(folder) < step]
        return before[-1] if before else None


def abandon(run_dir: Path, later: Iterable[Path]) -> bool:
    """Move those checkpoints that lie in a run's folder out of sight; those of the last time go.

    A folder that cannot be written is a warning: going back matters more.

    Returns:
        Whether any was moved.
    """
    there = [path for path in later if path.parent == run_dir and path.is_dir()]
    if not there:
        return False
    folder, num_moved = run_dir / ABANDONED, 0
    shutil.rmtree(folder, ignore_errors=True)
    for path in there:
        try:
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
        except OSError as error:
            logger.warning("%s stays, though interventions had begun to fail: %s.", path, error)
            continue
        num_moved += 1
        logger.warning(
            "%s was written after interventions began to fail; now in %s, where no resume looks.",
            path.name,
            folder,
        )
    return num_moved > 0


def _older(source: Path) -> tuple[Path, ...]:
    step = step_by_name(source)
    if step is None:
        return ()
    beside = [path for path in checkpoints_by_step(source.parent) if _step_of(path) < step]
    return tuple(path for path in beside if not is_superseded(path))


def _step_of(folder: Path) -> int:
    return step_by_name(folder) or 0
