"""Which checkpoints of a folder are of an earlier run, and which go beyond `save_total_limit`.

A run that is begun anew in a folder finds checkpoints of later steps there. Once it has saved one
of its own, those are not its newest, whatever their numbers and the files' times say.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from hf_pss.integration.checkpoints.judge import checkpoints_by_step, step_by_name

__all__ = ["SUPERSEDED", "claim_", "is_superseded", "rotate", "supersede_later_"]

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
