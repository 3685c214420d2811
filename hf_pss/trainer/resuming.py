"""Choose the checkpoint that a run resumes from, and load what the Trainer itself would not load.

The Trainer does not load three things: an incomplete checkpoint, the state of an optimizer of a
different kind, and renamed weights. transformers saves the experts of Mixtral, Qwen-MoE and some
other models as separate tensors, and `from_pretrained` stacks them. So their names in memory differ
from their names in the checkpoint. `Trainer` resumes with `load_state_dict` instead. In
transformers 5.23 it warns about missing keys and leaves the experts unchanged, so the run would
continue with wrong experts.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_pss.errors import StateError
from hf_pss.runs.checkpoint import (
    Examination,
    examine,
    examine_newest_first,
    layout_of,
    recorded_step,
)
from hf_pss.runs.folder import STATE_FILE
from hf_pss.runs.records_files import read_state
from hf_pss.view.numbers import plural

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
            what = "cannot be continued exactly" if found.has_only_weights else "is incomplete"
            raise StateError(f"{wanted} {what}: {found.why_not}. {_CHOICES}")
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


def backend_of(checkpoint: Path) -> str | None:
    """Return the backend that a checkpoint needs, or None for one process and DDP."""
    layout = layout_of(checkpoint)
    return "DeepSpeed" if layout == "deepspeed" else "FSDP" if "fsdp" in layout else None


def check_backend(checkpoint: Path, ours: str | None, *, accepts_fresh: bool) -> None:
    """Refuse a checkpoint of another backend, whose optimizer's state the Trainer cannot read.

    Args:
        checkpoint: The checkpoint to resume from.
        ours: The backend of this run, as `backend_of` names it.
        accepts_fresh: Whether this run may load the weights of DeepSpeed and start the rest fresh.

    Raises:
        StateError: The checkpoint was saved under another backend.
    """
    theirs = backend_of(checkpoint)
    if theirs == ours or (accepts_fresh and (theirs, ours) == ("DeepSpeed", None)):
        return
    names = [name or "one process or DDP" for name in (theirs, ours)]
    way_out = (
        ", or use missing_state='fresh' (--pss_missing_state fresh) to load its weights and start "
        "with a fresh optimizer"
        if (theirs, ours) == ("DeepSpeed", None)
        else ""
    )
    raise StateError(
        f"{checkpoint} was saved under {names[0]}, and this run trains under {names[1]}, where the "
        f"state of its optimizer cannot be read. Start the run under {names[0]}{way_out}."
    )


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
    for found in examine_newest_first(run_dir):
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

    def load_(target: Any, name: str) -> None:
        path = checkpoint / name
        target.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    if "optimizer.pt" not in missing and (checkpoint / "optimizer.pt").is_file():
        load_(optimizer, "optimizer.pt")
    if "scheduler.pt" not in missing and (checkpoint / "scheduler.pt").is_file():
        load_(scheduler, "scheduler.pt")
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # a loaded optimizer state would have set it
    else:
        step = recorded_step(checkpoint)
        move_to_(scheduler, {"last_epoch": step, "_step_count": step + 1})


def place_in_data(checkpoint: Path, num_accumulated: int) -> tuple[int, int]:
    """Return the complete passes over data without a length, and the batches of the next one.

    The Trainer (5.23) saves as ``epoch`` the passes plus the batches of the current pass, divided
    by the most batches that a run can have. After a step, the current pass has at least one batch.

    Args:
        checkpoint: The folder of the checkpoint.
        num_accumulated: The number of batches that a step accumulates.
    """
    state = read_state(checkpoint / STATE_FILE)
    epoch, most = state.get("epoch") or 0.0, (state.get("max_steps") or 0) * num_accumulated
    passes = max(0, math.ceil(epoch) - 1)
    return passes, round((epoch - passes) * most)


# ---- optimizers of another kind ----


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
    # A part that is divided by heads has a fourth number; see `Layout` in hf_pss.optim.layout.
    is_by_head = any(len(part) == 4 for _, parts in layouts for part in parts)
    how = " by head" if is_by_head else ""
    divided = f" in {plural(num_parts, 'part')}{how}" if num_parts else ""
    return f"{name} ({plural(len(group['params']), 'parameter')}{divided})"


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


# ---- renamed weights ----


def load_renamed_(model: object, checkpoint: Path) -> tuple[str, ...]:
    """Load the weights that the Trainer skipped because it loads weights by name.

    `from_pretrained` maps the names, so memory temporarily holds a second copy of the model.

    Args:
        model: The model to change. The function ignores a model that is not a `PreTrainedModel`. It
            also ignores a sharded model, because the checkpoints of sharded models keep the names
            that the weights have in memory.
        checkpoint: A folder with safetensors files. If it has none, the function does nothing.

    Returns:
        The names of the weights that were loaded.

    Raises:
        StateError: The model has weights that the checkpoint does not hold under any name.
    """
    saved = _saved_names(checkpoint)
    if not saved or not isinstance(model, PreTrainedModel):
        return ()
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        return ()
    # A checkpoint holds a tied weight once, under one of its names.
    there = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    missing = tuple(
        name
        for name, tensor in state.items()
        if name not in saved and tensor.data_ptr() not in there
    )
    if not missing:
        return ()
    twin = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    if foreign := [name for name in missing if name not in twin]:
        raise StateError(
            f"{checkpoint} does not hold {plural(len(foreign), 'weight')} of this model, such as "
            f"{foreign[0]}: it was saved from a different model. Build the model that it was saved "
            "from. To begin a new run with its weights, load them with from_pretrained, and leave "
            "resume_from_checkpoint out."
        )
    model.load_state_dict({name: twin[name] for name in missing}, strict=False)
    # The Trainer has just warned about missing keys. This message adds that they are loaded.
    logger.warning(
        "%d weights of %s have other names there, such as %s; loaded as from_pretrained does.",
        len(missing),
        checkpoint,
        missing[0],
    )
    return missing


def _saved_names(checkpoint: Path) -> set[str]:
    index, single = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return set()
