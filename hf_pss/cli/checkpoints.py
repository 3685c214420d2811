"""The checkpoints that lie in a run's folder, and which of them are good to go on from."""

from __future__ import annotations

import math
import re
from pathlib import Path

from transformers import TrainerState

__all__ = ["checkpoints_in", "is_complete", "latest_checkpoint", "step_of", "where_to_go_on"]

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"  # the last file that the Trainer writes


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return all of them, complete or not, by their step."""
    found = {path: _NAME.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Return the last complete one."""
    return next(filter(is_complete, reversed(checkpoints_in(output_dir))), None)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether it was written to its end, so that its state can be read."""
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
    candidates = [*([resumed] if resumed else []), *checkpoints_in(output_dir)]
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
    return TrainerState.load_from_json(str(checkpoint / _STATE))
