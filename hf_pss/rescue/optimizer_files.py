"""Rewrite the optimizer and schedule files of a checkpoint.

These two files are the only pickles that rescue opens, and it opens them only if the user allows
it. It always calls ``torch.load(weights_only=True)``, which builds tensors and plain values and
calls nothing else. Rescue requires torch 2.10 or later, because earlier versions have security
holes in this function: CVE-2025-32434 before 2.6 and CVE-2026-24747 before 2.10. If torch refuses
to load a file, rescue does not try another method.
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
    """Write an optimizer file with scaled learning rates, with an empty state, or with both.

    ``reset`` removes the state of all parameters: the moments and Adam's step count. If only
    the moments were set to zero, the large step count would make the first update up to 3.2
    times too large.

    Args:
        source: The optimizer.pt file to read.
        target: A path that does not exist yet.
        moments: ``keep`` or ``reset``.
        lr_scale: The factor by which every learning rate is multiplied.

    Raises:
        IncompatibleVersionError: The installed torch is too old to open the file safely.
        StateError: The file is damaged, or it holds more than tensors and plain values.
        OSError: A file could not be read or written.
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
    """Write a schedule file with scaled learning rates. The step of the schedule is unchanged.

    Raises:
        IncompatibleVersionError: The installed torch is too old to open the file safely.
        StateError: The file is damaged, or this kind of schedule has no base rates.
        OSError: A file could not be read or written.
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
    """Raise an error if the restricted unpickler of the installed torch has known security holes.

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
    except Exception as error:  # an unpickler can raise any exception for damaged bytes
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
    except RuntimeError as error:  # torch's archive writer raises this when a write fails
        raise OSError(
            errno.EIO, "torch could not write it; the disk may be full", target
        ) from error


def _scaled(rate: Any, scale: float, path: Path) -> Any:
    if isinstance(rate, bool) or not isinstance(rate, int | float | Tensor):
        raise StateError(f"{visible(path)} is damaged: {visible(rate)} is not a learning rate.")
    return rate * scale
