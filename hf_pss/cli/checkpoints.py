"""The checkpoints that lie in a run's folder, and which of them are good to go on from."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainerState

from hf_pss.integration.checkpoints.judge import STATE_FILE, checkpoints_by_step
from hf_pss.integration.checkpoints.resuming import newest_whole

__all__ = ["is_complete", "latest_checkpoint", "step_of", "where_to_go_on"]


def latest_checkpoint(output_dir: Path, *, accepts_fresh: bool = False) -> Path | None:
    """Return the newest one to go on from, and log which newer ones are passed over.

    Args:
        output_dir: The run's folder; None is returned where it holds no checkpoint at all.
        accepts_fresh: Also take one that lacks the optimizer's or the schedule's state.

    Raises:
        StateError: There are some, and none to go on from.
    """
    if not checkpoints_by_step(output_dir):
        return None
    return newest_whole(output_dir, accepts_fresh=accepts_fresh).path


def is_complete(checkpoint: Path) -> bool:
    """Tell whether its trainer_state.json, the last file that the Trainer writes, can be read."""
    try:
        _state(checkpoint)
    except (OSError, ValueError, TypeError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """Return how many steps had been taken."""
    return int(_state(checkpoint).global_step)


def where_to_go_on(output_dir: Path, resumed: Path | None) -> str:
    """Return the advice for a run that went wrong.

    Args:
        output_dir: The run's folder.
        resumed: What it had resumed from, which may lie elsewhere.
    """
    candidates = [*([resumed] if resumed else []), *checkpoints_by_step(output_dir)]
    complete = [path for path in candidates if is_complete(path)]
    healthy = [path for path in complete if _was_finite(path)]
    if not healthy and complete and not any(map(_evaluations, complete)):
        return f"No checkpoint was evaluated; the latest, of unknown health, is {complete[-1]}."
    if not healthy:
        return "No checkpoint has a finite evaluation to go on from: begin anew."
    return (
        f"The last checkpoint whose evaluation was finite is {healthy[-1]}: "
        "--resume_from_checkpoint goes on there at the old learning rate, --model starts from its "
        "weights at another."
    )


def _was_finite(checkpoint: Path) -> bool:
    return any(map(math.isfinite, _evaluations(checkpoint)))


def _evaluations(checkpoint: Path) -> list[float]:
    """Return the validation losses at the checkpoint's own step."""
    state = _state(checkpoint)
    rows = (row for row in state.log_history if row["step"] == state.global_step)
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE_FILE))
