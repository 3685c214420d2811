"""Rewrite the optimizer's and the schedule's files of a checkpoint.

They are the only pickles that rescue opens: only if the user allowed it, only by
``torch.load(weights_only=True)``, which builds tensors and plain values and calls nothing else, and
only with torch 2.10 or later, because earlier versions had holes there (CVE-2025-32434 before 2.6,
CVE-2026-24747 before 2.10). If torch refuses a file, no other way is tried.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_pss.errors import IncompatibleVersionError, StateError
from hf_pss.records.strict_json import visible

__all__ = [
    "OPTIMIZER",
    "SCHEDULER",
    "MomentsChange",
    "require_torch",
    "rewrite_optimizer",
    "rewrite_scheduler",
]

MomentsChange: TypeAlias = Literal["keep", "reset", "project"]

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_LEAST_TORCH = (2, 10)


def rewrite_optimizer(
    source: Path, target: Path, *, moments: MomentsChange, lr_scale: float
) -> None:
    """Write an optimizer's state with other learning rates, or with an empty state.

    ``reset`` empties the state of all parameters: moments and Adam's count of steps. A large count
    beside zero moments would make the first update up to 3.2 times too large.

    Args:
        source: optimizer.pt.
        target: A path that does not exist yet.
        moments: ``keep`` or ``reset``.
        lr_scale: Factor on every rate.

    Raises:
        IncompatibleVersionError: torch is too old to open the file.
        StateError: The file is damaged, or holds more than tensors and plain values.
        OSError: Reading or writing failed.
    """
    state = _load(source)
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise StateError(f"{visible(source)} does not hold an optimizer's state: no param_groups.")
    for group in groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] = _scaled(group[key], lr_scale, source)
    if moments == "reset":
        state["state"] = {}
    _save(state, target)


def rewrite_scheduler(source: Path, target: Path, *, lr_scale: float) -> None:
    """Write a schedule with scaled learning rates, at the same place of its course.

    Raises:
        IncompatibleVersionError: torch is too old to open the file.
        StateError: The file is damaged, or the schedule is not of the kind that has base rates.
        OSError: Reading or writing failed.
    """
    state = _load(source)
    if not isinstance(state.get("base_lrs"), list):
        raise StateError(
            f"{visible(source)} has no base_lrs: this kind of schedule cannot be scaled in a file. "
            "Leave --lr-scale out."
        )
    for key in ("base_lrs", "_last_lr"):
        if isinstance(state.get(key), list):
            state[key] = [_scaled(rate, lr_scale, source) for rate in state[key]]
    _save(state, target)


def require_torch() -> None:
    """Refuse a torch whose restricted unpickling is known to have holes.

    Raises:
        IncompatibleVersionError: torch is older than 2.10.
    """
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < _LEAST_TORCH:
        raise IncompatibleVersionError(
            f"You have torch {torch.__version__}. Before 2.10 a pickle can run programs even when "
            "it is opened with weights_only=True. Upgrade, or leave out the options that need "
            "--allow-pickle."
        )


def _load(path: Path) -> dict[str, Any]:
    require_torch()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise anything
        raise StateError(
            f"{visible(path)} cannot be opened: it is damaged, or holds more than tensors and "
            "plain values."
        ) from error
    if not isinstance(state, dict):
        raise StateError(f"{visible(path)} holds a {type(state).__name__}, not a state.")
    return state


def _save(state: dict[str, Any], target: Path) -> None:
    try:
        torch.save(state, target)
    except RuntimeError as error:  # torch's archive writer raises this where a write fails
        raise OSError(
            errno.EIO, "torch could not write it; the disk may be full", target
        ) from error


def _scaled(rate: Any, scale: float, path: Path) -> Any:
    if isinstance(rate, bool) or not isinstance(rate, int | float | Tensor):
        raise StateError(f"{visible(path)} is damaged: {visible(rate)} is not a learning rate.")
    return rate * scale
