"""The checkpoint from which `hf-pss train` resumes, and the one that it advises after a failure."""

from __future__ import annotations

import math
from pathlib import Path

from hf_pss.cli.train_options import TrainPlan
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.runs.checkpoint import examine, recorded_step
from hf_pss.runs.folder import STATE_FILE, checkpoints_by_step
from hf_pss.runs.records_files import read_log
from hf_pss.trainer.resuming import newest_whole

__all__ = ["advice_after_failure", "choose_checkpoints", "latest_checkpoint"]


def choose_checkpoints(plan: TrainPlan) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint to resume from, and the earlier run's checkpoints to remove.

    Raises:
        ConfigurationError: There is nothing to resume, nothing left to train, or the folder holds
            an earlier run.
        StateError: There are checkpoints, but none is complete.
    """
    output_dir = Path(plan.arguments.output_dir)
    given = str(plan.arguments.resume_from_checkpoint or "false")
    if plan.run.resume or given.lower() == "true":
        accepts_fresh = plan.arguments.pss_missing_state == "fresh"
        latest = latest_checkpoint(output_dir, accepts_fresh=accepts_fresh)
        if latest is None:
            raise ConfigurationError(
                f"{output_dir} holds no checkpoint to resume from. Leave --resume out, or give "
                "the --output_dir of the run that you want to continue."
            )
    elif given.lower() != "false":
        latest = Path(given)
    else:
        earlier = checkpoints_by_step(output_dir)
        if not plan.run.overwrite and any(_step_of(path) is not None for path in earlier):
            raise ConfigurationError(
                f"{output_dir} holds checkpoints of an earlier run. Add --resume to continue it, "
                "--overwrite to remove them, or choose another --output_dir."
            )
        return None, earlier if plan.run.overwrite else []
    step, max_steps = _step_of(latest), plan.arguments.max_steps
    if step is None:
        raise ConfigurationError(f"{latest} is not a complete checkpoint: no {STATE_FILE}.")
    if 0 < max_steps <= step:  # the Trainer would still take one more step (5.23)
        where = "at" if step == max_steps else "past"
        raise ConfigurationError(
            f"{latest.name} is already {where} --max_steps {max_steps}. Give more steps, or start "
            "a run in another --output_dir."
        )
    return latest, []


def latest_checkpoint(output_dir: Path, *, accepts_fresh: bool = False) -> Path | None:
    """Return the newest checkpoint that can be resumed, and log the newer ones that cannot.

    Args:
        output_dir: The run's folder. The result is None if it holds no checkpoint at all.
        accepts_fresh: Also accept a checkpoint without the optimizer's or the schedule's state.

    Raises:
        StateError: There are checkpoints, but none can be resumed.
    """
    if not checkpoints_by_step(output_dir):
        return None
    return newest_whole(output_dir, accepts_fresh=accepts_fresh).path


def advice_after_failure(output_dir: Path, resumed: Path | None) -> str:
    """Return the advice for a run that failed: which checkpoint to continue from, and how.

    Args:
        output_dir: The run's folder.
        resumed: The checkpoint from which the run had resumed. It may be in a different folder.
    """
    candidates = [*([resumed] if resumed else []), *checkpoints_by_step(output_dir)]
    usable = [found for found in map(examine, candidates) if found.problem is None]
    losses = {found.path: _evaluations(found.path) for found in usable}
    healthy = [found for found in usable if any(map(math.isfinite, losses[found.path]))]
    if not healthy and usable and not any(losses.values()):
        return f"No checkpoint was evaluated; the latest, of unknown health, is {usable[-1].path}."
    if not healthy:
        return "No checkpoint has a finite evaluation to continue from: start the run again."
    best = healthy[-1]
    resume = "--resume_from_checkpoint continues from it at the old learning rate, "
    return (
        f"The last checkpoint whose evaluation was finite is {best.path}: "
        f"{resume if best.is_whole else ''}--model starts from its weights at another."
    )


def _step_of(checkpoint: Path) -> int | None:
    try:
        return recorded_step(checkpoint)
    except (StateError, OSError):
        return None


def _evaluations(checkpoint: Path) -> list[float]:
    """Return the validation losses at the step of the checkpoint."""
    log = read_log(checkpoint / STATE_FILE)
    rows = (row for row in log.rows if row.step == log.global_step)
    return [row.eval_loss for row in rows if row.eval_loss is not None]
