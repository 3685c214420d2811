"""Write a repaired copy of a checkpoint.

The copy is either complete or not written at all, and it never replaces an existing file.

optimizer.pt and scheduler.pt are the only pickles that rescue opens, and it opens them only if the
user allows it. It always calls ``torch.load(weights_only=True)``, which builds tensors and plain
values and calls nothing else. Rescue requires torch 2.10 or later, because earlier versions have
security holes in this function: CVE-2025-32434 before 2.6 and CVE-2026-24747 before 2.10. If torch
refuses to load a file, rescue does not try another method.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError, IncompatibleVersionError, StateError
from hf_pss.records.strict_json import visible
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.smoothed_weights import Repair, summary, write_weights
from hf_pss.runs.checkpoint import PICKLED_WEIGHTS, read_marker, write_marker
from hf_pss.runs.folder import (
    MARKER,
    MAX_FILES,
    OPTIONS_FILE,
    STATE_FILE,
    SUPERSEDED,
    leads_out,
    new_folder,
)
from hf_pss.runs.options import options_file, read_options
from hf_pss.runs.records_files import read_state
from hf_pss.runs.safetensors_files import Checkpoint, open_checkpoint
from hf_pss.runs.signals import signals_interrupt

MomentsChange: TypeAlias = Literal["keep", "reset", "project"]

RECORD_FILE = "hf_pss_rescue.json"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_LEAST_TORCH = (2, 10)
# training_args.bin is a pickle that a resumed run does not need. The other files hold weights in
# formats that are not smoothed.
_LEFT_OUT = ("training_args.bin", *PICKLED_WEIGHTS, "tf_model.h5")


@dataclass(frozen=True, slots=True)
class Repairs:
    """The repairs to make."""

    smoothing: str = "none"
    """The name of a smoothing function, ``none`` or ``floor``. The floor is derived from the stable
    ranks of noise matrices, and sound weights can be below it as well."""
    moments: MomentsChange = "keep"
    lr_scale: float = 1.0
    skip_batches: int = 0
    """The number of update steps whose batches to skip. If gradients are accumulated, one step uses
    several batches of the data loader."""
    allow_pickle: bool = False

    @property
    def needs_pickle(self) -> bool:
        """Whether optimizer.pt must be opened."""
        return self.moments != "keep" or self.lr_scale != 1.0


@dataclass(frozen=True, slots=True)
class Written:
    """The copy that was written."""

    path: Path
    source: Path
    step: int
    """The step from which a run resumes with the copy."""
    matrices: tuple[Repair, ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


def write_repaired(chosen: CheckpointReport, target: Path, options: Repairs) -> Written:
    """Write the repaired copy.

    Args:
        chosen: A complete checkpoint with finite weights, written by one process or by DDP.
        target: A path that does not exist yet. Its parent folder must exist.
        options: The repairs.

    Raises:
        ConfigurationError: The checkpoint is sharded, the target exists or is inside the
            checkpoint, or an option needs a pickle that the user has not allowed to open.
        IncompatibleVersionError: The installed torch is too old to open a pickle safely.
        StateError: A file is damaged, or a symbolic link leads out of the checkpoint.
        OSError: A file could not be read or written. The partial copy is removed.
        KeyboardInterrupt: The process received SIGTERM or SIGHUP. The partial copy is removed.
    """
    _check(chosen, target, options)
    source = chosen.path.resolve()
    for name in (STATE_FILE, MARKER, _OPTIMIZER, _SCHEDULER):
        _refuse_outside(source, source / name)
    checkpoint = open_checkpoint(source)
    with signals_interrupt(), new_folder(target, like=source) as folder:
        done = {Path(name) for name in (STATE_FILE, MARKER, SUPERSEDED)}
        done |= {entry.path.relative_to(source) for entry in checkpoint.tensors}
        if options.needs_pickle:
            moments, lr_scale = options.moments, options.lr_scale
            rewrite_optimizer(source / _OPTIMIZER, folder / _OPTIMIZER, moments, lr_scale)
            done.add(Path(_OPTIMIZER))
        if options.lr_scale != 1.0:
            _rewrite_scheduler(source / _SCHEDULER, folder / _SCHEDULER, options.lr_scale)
            done.add(Path(_SCHEDULER))
        repairs = write_weights(checkpoint, source, folder, options.smoothing)
        left_out = _copy_others(source, folder, done)
        _copy_run_options(source, folder)
        _check_names(checkpoint, folder)
        written = Written(
            path=target,
            source=source,
            step=chosen.step + options.skip_batches,
            matrices=tuple(repairs),
            left_out=left_out,
            remarks=tuple(_remarks(options, repairs, left_out)),
        )
        record = {**asdict(options), **as_json(written)}
        (folder / RECORD_FILE).write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
        _write_state(source / STATE_FILE, folder / STATE_FILE, options.skip_batches)
        if read_marker(source) is not None:  # a checkpoint of a plain Trainer has no marker
            write_marker(folder, step=written.step)
    return written


def as_json(written: Written) -> dict[str, Any]:
    """Return the record as data that JSON can hold."""
    plain = asdict(written)
    return {**plain, "path": str(written.path), "source": str(written.source)}


def _check(chosen: CheckpointReport, target: Path, options: Repairs) -> None:
    if chosen.layout != "whole":
        raise ConfigurationError(
            f"{visible(chosen.path)} has the layout {chosen.layout}. --write can copy only "
            "checkpoints of one process or of DDP. Use the command that is printed without "
            "--write: it smooths under every backend."
        )
    if target.exists() or target.is_symlink():
        raise ConfigurationError(f"{visible(target)} exists. Give a folder that does not.")
    if not target.parent.is_dir():
        raise ConfigurationError(f"There is no folder {visible(target.parent)} to write into.")
    if target.resolve().is_relative_to(chosen.path.resolve()):
        raise ConfigurationError(f"{visible(target)} is inside the checkpoint to be copied.")
    if options.moments == "project":
        raise ConfigurationError(
            "--moments project must assign moments to matrices, but optimizer.pt only numbers "
            "them, in an order that the model defines. Resume with the printed command and "
            "--pss_moments project, or give --moments reset."
        )
    if chosen.has_only_weights and (options.needs_pickle or options.lr_scale != 1.0):
        raise ConfigurationError(
            f"{visible(chosen.path)} holds only weights (save_only_model), so --moments reset and "
            "--lr-scale have nothing to change. Leave them out."
        )
    if options.needs_pickle and not options.allow_pickle:
        raise ConfigurationError(
            "--moments reset and --lr-scale change optimizer.pt and scheduler.pt, which are "
            "pickles. Add --allow-pickle if you trust the source of the checkpoint. They are "
            "opened with weights_only=True."
        )


def _copy_others(source: Path, folder: Path, done: set[Path]) -> tuple[str, ...]:
    paths = sorted(islice(source.rglob("*"), MAX_FILES + 1))
    if len(paths) > MAX_FILES:
        raise StateError(f"{visible(source)} holds more than {MAX_FILES} files.")
    left_out = []
    for path in paths:
        name = path.relative_to(source)
        if name in done or (path.is_dir() and not path.is_symlink()):
            continue
        if any(path.match(pattern) for pattern in _LEFT_OUT) or not path.is_file():
            left_out.append(visible(name))
            continue
        _refuse_outside(source, path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return tuple(left_out)


def _refuse_outside(source: Path, path: Path) -> None:
    if leads_out(path, source):
        raise StateError(f"{visible(path)} is a link that leads out of the checkpoint.")


def _copy_run_options(source: Path, folder: Path) -> None:
    """Copy the run's options into the copy, if they are in the folder that holds the checkpoint.

    The target can be outside the run's folder, so a resumed run would not find them otherwise.
    """
    path = options_file(source)
    if path is None or path.parent == source:  # copied with the other files
        return
    with suppress(StateError):  # a damaged file is not copied
        read_options(path)
        shutil.copyfile(path, folder / OPTIONS_FILE)


def _write_state(source: Path, target: Path, skip: int) -> None:
    """Copy the Trainer's state and add `skip` to its step.

    A resumed Trainer skips the data of all steps up to ``global_step``.
    """
    if not skip:
        shutil.copyfile(source, target)
        return
    state = read_state(source)
    step = state["global_step"]
    state["global_step"] = step + skip
    if state.get("num_train_epochs") == sys.maxsize:  # data without a length: see place_in_data
        state["epoch"] += skip / state["max_steps"]
    saved = state.get("stateful_callbacks")
    for name in ("PSSCallback", "attributes", "saved_state"):
        saved = saved.get(name) if isinstance(saved, dict) else None
    if isinstance(saved, dict) and saved.get("step") == step:
        saved["step"] = step + skip  # otherwise PSS would reject its state as one of another step
    # This is the format of transformers, which writes NaN as a bare word.
    target.write_text(f"{json.dumps(state, indent=2, sort_keys=True)}\n", encoding="utf-8")


def _check_names(checkpoint: Checkpoint, folder: Path) -> None:
    copied = open_checkpoint(folder)
    before = [(entry.name, entry.dtype, entry.shape) for entry in checkpoint.tensors]
    after = [(entry.name, entry.dtype, entry.shape) for entry in copied.tensors]
    if before != after:
        raise StateError(f"{visible(checkpoint.path)} changed while it was copied.")


def _remarks(options: Repairs, repairs: list[Repair], left_out: tuple[str, ...]) -> Iterator[str]:
    if options.smoothing != "none":
        yield summary(repairs)
    if options.smoothing == "floor" and any(one.changed for one in repairs):
        yield (
            "The measure was noise of their shapes. Sound weights also lie below that, "
            "especially pretrained weights. If your weights are not damaged, call hf-pss rescue "
            "with --smoothing none."
        )
    if options.moments == "reset":
        yield "The optimizer starts without state, at the rate of the schedule."
    if options.lr_scale != 1.0:
        yield f"Every learning rate is {options.lr_scale:g} times the old one on the same course."
    if options.skip_batches:
        yield (
            f"global_step is increased by {options.skip_batches}, so a resumed Trainer skips the "
            "data of that many updates and ends that many updates earlier. The position of the "
            "schedule does not change."
        )
    if left_out:
        yield f"Not copied: {', '.join(left_out[:5])}{'…' if len(left_out) > 5 else ''}."


def rewrite_optimizer(source: Path, target: Path, moments: MomentsChange, lr_scale: float) -> None:
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
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] = _scaled(group[key], lr_scale, source)
    if moments == "reset":
        state["state"] = {}
    _save(state, target)


def _rewrite_scheduler(source: Path, target: Path, lr_scale: float) -> None:
    """Write a schedule file with scaled learning rates. The step of the schedule is unchanged."""
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
