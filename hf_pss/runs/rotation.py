"""Decide which checkpoints belong to a run, and which ones `save_total_limit` removes.

A run may start in the folder of an earlier run and find checkpoints of later steps there. Once the
new run has saved a checkpoint, those older checkpoints do not count as the newest ones, regardless
of their step numbers and dates.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_pss.runs.checkpoint import Examination, examine
from hf_pss.runs.folder import ABANDONED, SUPERSEDED, checkpoints_by_step, step_by_name

__all__ = ["Lineage", "abandon", "claim_", "is_superseded", "rotate", "supersede_later_"]

logger = logging.getLogger(__name__)


def is_superseded(folder: Path) -> bool:
    """Return whether a later run has started in the same run folder and has saved there."""
    return (folder / SUPERSEDED).exists()


def claim_(folder: Path) -> None:
    """Remove the mark of an earlier run from a checkpoint, because a run continues from it."""
    try:
        (folder / SUPERSEDED).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be changed: %s.", folder, error)


def supersede_later_(run_dir: Path, *, step: int) -> None:
    """Mark checkpoints of steps after the one that was just saved, so that none is resumed."""
    for folder in checkpoints_by_step(run_dir):
        if _step_of(folder) <= step or is_superseded(folder):
            continue
        logger.warning(
            "%s is of an earlier run, because step %d was saved after it: "
            "resume_from_checkpoint=True will skip it.",
            folder,
            step,
        )
        try:
            (folder / SUPERSEDED).touch()
        except OSError as error:
            logger.warning("%s cannot be changed, and may be resumed: %s.", folder, error)


def rotate(run_dir: Path, *, limit: int | None, step: int, kept: Collection[str]) -> None:
    """Remove checkpoints beyond the limit, first those of an earlier run and then the oldest.

    Args:
        run_dir: The folder that holds the ``checkpoint-N`` folders.
        limit: The value of `save_total_limit`. If it is None or 0, nothing is removed.
        step: The step that was just saved.
        kept: The names of checkpoints that stay, even beyond the limit.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_by_step(run_dir)
    found.sort(key=lambda folder: _step_of(folder) <= step)  # a stable sort keeps the step order
    for folder in [one for one in found if one.name not in kept]:
        if len(found) <= limit:
            return
        logger.info("Removing %s: save_total_limit is %d.", folder, limit)
        shutil.rmtree(folder, ignore_errors=True)
        found.remove(folder)


@dataclass(frozen=True, slots=True)
class Lineage:
    """The checkpoints that belong to a run, in the order of saving.

    They are the checkpoint that the run was resumed from, older checkpoints in the same folder as
    that one, and the checkpoints that the run has saved. Some of them may have been removed since.
    The run does not return to any other checkpoint in its folder.
    """

    folders: tuple[Path, ...] = ()
    source: Path | None = None
    """The checkpoint that the run was resumed from, which may be in any folder. It is None for
    a new run."""

    @classmethod
    def of(cls, source: Path | None) -> Lineage:
        """Return the lineage of a run that is resumed from a checkpoint, or of a new run."""
        if source is None:
            return cls()
        step = step_by_name(source)
        beside = [] if step is None else checkpoints_by_step(source.parent)
        older = (path for path in beside if _step_of(path) < (step or 0))
        return cls((*(path for path in older if not is_superseded(path)), source), source)

    @property
    def names(self) -> set[str]:
        """The names of the checkpoint folders."""
        return {folder.name for folder in self.folders}

    def with_saved(self, folder: Path) -> Lineage:
        """Return the lineage extended by a checkpoint that was just saved."""
        return replace(self, folders=(*self.folders, folder))

    def up_to(self, step: int) -> Lineage:
        """Return the lineage without the checkpoints of later steps."""
        return replace(self, folders=tuple(f for f in self.folders if _step_of(f) <= step))

    def newest_before(self, step: int) -> Examination | None:
        """Return the newest complete checkpoint of an earlier step, and log the skipped ones."""
        for folder in reversed(self.folders):
            if not folder.is_dir():  # rotation has removed it
                continue
            found = examine(folder)
            if found.step >= step:
                continue
            if found.is_whole:
                return found
            logger.warning("Skipping %s: %s.", folder, found.why_not)
        return None

    def name_before(self, step: int) -> str | None:
        """Return the name of the last checkpoint before a step, complete or not."""
        before = [folder.name for folder in self.folders if _step_of(folder) < step]
        return before[-1] if before else None


def abandon(run_dir: Path, later: Iterable[Path]) -> bool:
    """Move checkpoints of a run to the folder `ABANDONED`, and remove its previous content.

    If a checkpoint cannot be moved, the function logs a warning and continues, because the rollback
    is more important.

    Returns:
        Whether any checkpoint was moved.
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
            logger.warning(
                "%s cannot be moved, although interventions had begun to fail: %s.", path, error
            )
            continue
        num_moved += 1
        logger.warning(
            "%s was written after interventions began to fail. It was moved to %s, so that no run "
            "resumes from it.",
            path.name,
            folder,
        )
    return num_moved > 0


def _step_of(folder: Path) -> int:
    return step_by_name(folder) or 0
