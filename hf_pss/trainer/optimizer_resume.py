"""Resume from a checkpoint that a different kind of optimizer wrote.

The functions compare the kinds of the two optimizers and move the schedule to the saved step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim.lr_scheduler import LambdaLR

from hf_pss.optim.layout import is_by_head

__all__ = ["Kind", "kind_of", "move_to_", "saved_kind"]

Kind: TypeAlias = tuple[str | None, ...]
"""One entry per parameter group: its update rule, its number of parameters and its number of parts.
The entry is None if the group has no rule."""

# File names that accelerate and transformers use. A run of one process or of DDP writes
# optimizer.pt. FSDP2 writes optimizer.bin (full state) or the folder optimizer_0 (sharded state).
_WHOLE = ("optimizer.pt", "optimizer.bin")
_SHARDED = "optimizer_0"
_ENTRY = re.compile(r"optimizer\.param_groups\.(\d+)\.(\w+)$")
_TELLING = ("algo", "params", "train_mode", "layouts")
# These lists have one entry per parameter group. The groups of the two optimizers differ in number
# and order, so the saved lists cannot be used.
_BY_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs")


def kind_of(groups: Iterable[Mapping[str, Any]]) -> Kind:
    """Return the kind of an optimizer, which its parameter groups determine."""
    return tuple(_kind_of_group(group) for group in groups)


def _kind_of_group(group: Mapping[str, Any]) -> str | None:
    algo: str | None = group.get("algo")
    if algo is None:
        return None
    name = f"schedule-free {algo}" if "train_mode" in group else algo
    # The rule keeps one state per matrix. Layouts of vectors are left out, because a sharded
    # checkpoint loses the empty tuple in them.
    layouts = [layout for layout in group.get("layouts") or () if len(layout) > 1]
    num_parts = sum(len(parts) for _, parts in layouts)
    how = " by head" if any(map(is_by_head, layouts)) else ""
    divided = f" in {num_parts} parts{how}" if num_parts else ""
    return f"{name} ({len(group['params'])} parameters{divided})"


def saved_kind(checkpoint: Path) -> Kind | None:
    """Return the kind of optimizer that wrote a checkpoint, or None if no state was saved."""
    for name in _WHOLE:
        if (checkpoint / name).is_file():
            # The file is memory-mapped, so only the parameter groups are read from the disk.
            state = torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
            return kind_of(state["param_groups"])
    if (checkpoint / _SHARDED / ".metadata").is_file():
        return _sharded_kind(checkpoint / _SHARDED)
    return None


def move_to_(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Move a schedule to the step of a saved schedule, but keep the rates of the new optimizer.

    Args:
        scheduler: A new schedule, at step 0.
        saved: The state dict of a schedule whose optimizer had different parameter groups.
    """
    state = {key: value for key, value in saved.items() if key not in _BY_GROUP}
    scheduler.__dict__.update(state)
    if isinstance(scheduler, LambdaLR):  # transformers has only two schedules of another class
        step = scheduler.last_epoch
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * curve(step) for base, curve in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def _sharded_kind(folder: Path) -> Kind:
    reader = FileSystemReader(folder)
    entries = map(_ENTRY.match, reader.read_metadata().state_dict_metadata)
    found = [(int(entry[1]), entry[2]) for entry in entries if entry]
    groups: list[dict[str, Any]] = [{} for _ in range(1 + max((i for i, _ in found), default=-1))]
    for i, name in found:
        if name in _TELLING:
            groups[i][name] = None  # load() fills it
    # torch warns about no_dist. It is intended here, because each rank reads only a little data.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load({"optimizer": {"param_groups": groups}}, storage_reader=reader, no_dist=True)
    return kind_of(groups)
