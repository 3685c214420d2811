"""Which checkpoint a run goes on from, and what is said where there is none."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from hf_pss.errors import StateError
from hf_pss.runs.checkpoint import Examination, examine, recorded_step
from hf_pss.runs.folder import checkpoints_by_step, step_by_name
from hf_pss.runs.rotation import is_superseded
from hf_pss.trainer.optimizer_resume import move_to_

__all__ = ["checkpoint_to_resume", "load_what_is_there_", "newest_whole"]

logger = logging.getLogger(__name__)

_CHOICES = (
    "The Trainer would begin the optimizer and the learning rate's schedule anew without a word. "
    "Choose: another checkpoint; the missing file, from a backup; or missing_state='fresh' "
    "(--pss_missing_state fresh) to go on from its weights with whatever of the two is readable."
)


def checkpoint_to_resume(
    wanted: str | Path | bool | None, run_dir: Path, *, accepts_fresh: bool = False
) -> str | None:
    """Return the folder to resume from; None where nothing is to be resumed.

    Args:
        wanted: As `Trainer.train` takes it: a folder, or True for the newest that is whole.
        run_dir: Where True looks.
        accepts_fresh: Take one without the optimizer's or the schedule's state all the same.

    Raises:
        StateError: There is none, or the one that was named is not whole.
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
                "checkpoint, or let resume_from_checkpoint=True find the newest that is valid."
            )
        if found.lacks and not accepts_fresh:
            raise StateError(f"{wanted} is not whole: {found.why_not}. {_CHOICES}")
    if found.lacks:
        logger.warning("%s: %s, and begins anew, as asked for.", found.path, found.why_not)
    if not found.is_marked:
        logger.warning(
            "%s has no marker of PSS: a plain Trainer wrote it. Its files are readable and its "
            "safetensors finite, as far as can be told without opening a pickle.",
            found.path,
        )
    return str(wanted if wanted is not True else found.path)


def newest_whole(run_dir: Path, *, accepts_fresh: bool = False) -> Examination:
    """Return the newest checkpoint to go on from, and log which newer ones were passed over.

    Args:
        run_dir: Holds ``checkpoint-N`` folders.
        accepts_fresh: Also take one that lacks the optimizer's or the schedule's state.

    Raises:
        StateError: There is none.
    """
    passed: list[Examination] = []
    for folder in reversed(checkpoints_by_step(run_dir)):
        found = examine(folder) if not is_superseded(folder) else _of_an_earlier_run(folder)
        if found.is_whole or (accepts_fresh and found.problem is None):
            for one in passed:
                logger.warning("%s is passed over: %s.", one.path, one.why_not)
            return found
        passed.append(found)
    if not passed:
        raise StateError(f"No valid checkpoint found in output directory ({run_dir}).")
    listed = "; ".join(f"{one.path.name}: {one.why_not}" for one in passed)
    advice = _CHOICES if any(one.problem is None for one in passed) else "Begin the run anew."
    raise StateError(
        f"No valid checkpoint found in output directory ({run_dir}): {listed}. {advice}"
    )


def _of_an_earlier_run(folder: Path) -> Examination:
    why = "of an earlier run than the last one that saved here; name it to go on from it"
    return Examination(folder, step_by_name(folder) or 0, is_marked=False, problem=why)


def load_what_is_there_(
    optimizer: Any, scheduler: Any, checkpoint: Path, missing: Collection[str]
) -> None:
    """Load what is readable of an optimizer's and a schedule's state; the rest begins anew.

    A schedule that is a function of the step, as most are, is put where the step says.

    Args:
        optimizer: As the Trainer has prepared it; not sharded, where its state is to be loaded.
        scheduler: Fresh.
        checkpoint: The folder.
        missing: Names of the files that are not there, or not readable.
    """
    if "optimizer.pt" not in missing and (checkpoint / "optimizer.pt").is_file():
        optimizer.load_state_dict(_load(checkpoint / "optimizer.pt"))
    if "scheduler.pt" not in missing:
        scheduler.load_state_dict(_load(checkpoint / "scheduler.pt"))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # which the optimizer's state would have brought
    else:
        step = recorded_step(checkpoint)
        move_to_(scheduler, {"last_epoch": step, "_step_count": step + 1})


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
