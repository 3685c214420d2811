"""The optimizer's and the schedule's files of a checkpoint, the only pickles that are ever opened.

Only where the user allowed it, only by ``torch.load(weights_only=True)``, which builds tensors and
plain values and calls nothing else, and only from torch 2.10 on: earlier ones had holes there
(CVE-2025-32434 before 2.6, CVE-2026-24747 before 2.10). No other way is tried where it refuses.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError, IncompatibleVersionError, StateError
from hf_pss.records.strict_json import visible

__all__ = [
    "OPTIMIZER",
    "SCHEDULER",
    "Moments",
    "refuse_project",
    "require_torch",
    "rewrite_optimizer",
    "rewrite_scheduler",
]

Moments: TypeAlias = Literal["keep", "reset", "project"]

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_LEAST_TORCH = (2, 10)


def rewrite_optimizer(source: Path, target: Path, *, moments: Moments, lr_scale: float) -> None:
    """Write an optimizer's state with other rates, or with no state at all.

    ``reset`` empties the state of all parameters: moments and Adam's count of steps, for a large
    count beside zero moments would make the first update up to 3.2 times too large.

    Args:
        source: optimizer.pt.
        target: Does not exist yet.
        moments: ``keep`` or ``reset``.
        lr_scale: Factor on every rate.

    Raises:
        IncompatibleVersionError: torch is too old to open it.
        StateError: It is damaged, or holds more than tensors and plain values.
        OSError: Reading or writing failed.
    """
    state = _load(source)
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise StateError(f"{visible(source)} is no optimizer's state: it has no param_groups.")
    for group in groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] = _scaled(group[key], lr_scale, source)
    if moments == "reset":
        state["state"] = {}
    _save(state, target)


def rewrite_scheduler(source: Path, target: Path, *, lr_scale: float) -> None:
    """Write a schedule whose rates are so many times as high, at the same place of its course.

    Raises:
        IncompatibleVersionError: torch is too old to open it.
        StateError: It is damaged, or is not of the kind that has base rates.
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
        IncompatibleVersionError: It does.
    """
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < _LEAST_TORCH:
        raise IncompatibleVersionError(
            f"You have torch {torch.__version__}; pickles are opened from 2.10 on, for before it "
            "they can run programs even so. Upgrade, or leave out what needs --allow-pickle."
        )


def _load(path: Path) -> dict[str, Any]:
    require_torch()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes make of an unpickler
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
    except RuntimeError as error:  # so its archive writer says that a write failed
        raise OSError(
            errno.EIO, "torch could not write it; the disk may be full", target
        ) from error


def _scaled(rate: Any, scale: float, path: Path) -> Any:
    if isinstance(rate, bool) or not isinstance(rate, int | float | Tensor):
        raise StateError(f"{visible(path)} is damaged: {visible(rate)} is no learning rate.")
    return rate * scale


def refuse_project() -> None:
    """Say why moments cannot be projected in a file.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        "--moments project needs to know which moment belongs to which matrix, and optimizer.pt "
        "numbers them in an order that only the model knows. Resume with the printed command and "
        "--pss_moments project, or give --moments reset."
    )
