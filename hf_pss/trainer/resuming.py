"""Choose the checkpoint that a run resumes from, and load an incomplete one on request."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from hf_pss.errors import StateError
from hf_pss.runs.checkpoint import Examination, examine, is_superseded, recorded_step
from hf_pss.runs.folder import checkpoints_by_step, step_by_name
from hf_pss.trainer.optimizer_resume import move_to_

__all__ = ["checkpoint_to_resume", "load_what_is_there_", "newest_whole"]

logger = logging.getLogger(__name__)

_CHOICES = (
    "The Trainer would silently start the optimizer and the learning-rate schedule from their "
    "initial state. Choose another checkpoint, restore the missing file from a backup, or use "
    "missing_state='fresh' (--pss_missing_state fresh) to load the weights and the readable rest."
)


def checkpoint_to_resume(
    wanted: str | Path | bool | None, run_dir: Path, *, accepts_fresh: bool = False
) -> str | None:
    """Return the folder to resume from, or None if the run is not resumed.

    Args:
        wanted: The argument of `Trainer.train`: a folder, or True for the
            newest complete checkpoint.
        run_dir: The folder in which to look if `wanted` is True.
        accepts_fresh: Whether a checkpoint without the state of the optimizer or the
            schedule is accepted.

    Raises:
        StateError: No checkpoint exists, or the one that the user named is incomplete.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        found = newest_whole(run_dir, accepts_fresh=accepts_fresh)
    else:
        found = examine(Path(wanted))
        if found.problem is not None:
            raise StateError(
                f"Can't find a valid checkpoint at {wanted}: {found.problem}. Name another "
                "checkpoint, or use resume_from_checkpoint=True, which takes the newest valid one."
            )
        if found.lacks and not accepts_fresh:
            raise StateError(f"{wanted} is incomplete: {found.why_not}. {_CHOICES}")
    if found.lacks:
        logger.warning(
            "%s: %s. As requested, that part starts from its initial state.",
            found.path,
            found.why_not,
        )
    if not found.is_marked:
        logger.warning(
            "%s has no marker of PSS, so a plain Trainer wrote it. Its files are readable and its "
            "safetensors are finite. Its pickles were not opened.",
            found.path,
        )
    return str(wanted if wanted is not True else found.path)


def newest_whole(run_dir: Path, *, accepts_fresh: bool = False) -> Examination:
    """Return the newest checkpoint to resume from, and log which newer ones were skipped.

    Args:
        run_dir: The folder that holds the ``checkpoint-N`` folders.
        accepts_fresh: Whether a checkpoint without the state of the optimizer or the
            schedule is accepted.

    Raises:
        StateError: No checkpoint qualifies.
    """
    passed: list[Examination] = []
    for folder in reversed(checkpoints_by_step(run_dir)):
        found = examine(folder) if not is_superseded(folder) else _of_an_earlier_run(folder)
        if found.is_whole or (accepts_fresh and found.problem is None):
            for one in passed:
                logger.warning("Skipping %s: %s.", one.path, one.why_not)
            return found
        passed.append(found)
    if not passed:
        raise StateError(f"No valid checkpoint found in output directory ({run_dir}).")
    listed = "; ".join(f"{one.path.name}: {one.why_not}" for one in passed)
    advice = _CHOICES if any(one.problem is None for one in passed) else "Start the run again."
    raise StateError(
        f"No valid checkpoint found in output directory ({run_dir}): {listed}. {advice}"
    )


def _of_an_earlier_run(folder: Path) -> Examination:
    why = "an earlier run wrote it, and a later run has saved here; to resume it, pass its path"
    return Examination(folder, step_by_name(folder) or 0, is_marked=False, problem=why)


def load_what_is_there_(
    optimizer: Any, scheduler: Any, checkpoint: Path, missing: Collection[str]
) -> None:
    """Load those states of the optimizer and the schedule that can be read.

    An optimizer without a saved state keeps its initial state. A schedule without a saved state
    moves to the step of the checkpoint, because most schedules are functions of the step.

    Args:
        optimizer: The optimizer that the Trainer has prepared. It must not be sharded if its
            state is loaded.
        scheduler: The schedule in its initial state.
        checkpoint: The folder of the checkpoint.
        missing: The names of the files that are missing or unreadable.
    """
    if "optimizer.pt" not in missing and (checkpoint / "optimizer.pt").is_file():
        optimizer.load_state_dict(_load(checkpoint / "optimizer.pt"))
    if "scheduler.pt" not in missing:
        scheduler.load_state_dict(_load(checkpoint / "scheduler.pt"))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # a loaded optimizer state would have set it
    else:
        step = recorded_step(checkpoint)
        move_to_(scheduler, {"last_epoch": step, "_step_count": step + 1})


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
