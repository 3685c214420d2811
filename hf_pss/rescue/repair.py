"""Write a repaired copy of a checkpoint.

The copy is either complete or not written at all, and it never replaces an existing file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_pss.errors import ConfigurationError, StateError
from hf_pss.records.strict_json import visible
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.optimizer_files import (
    OPTIMIZER,
    SCHEDULER,
    MomentsChange,
    require_torch,
    rewrite_optimizer,
    rewrite_scheduler,
)
from hf_pss.rescue.smoothed_weights import Repair, matrices_to_smooth, summary, write_weights
from hf_pss.runs.checkpoint import PICKLED_WEIGHTS, read_marker, write_marker
from hf_pss.runs.durable import new_folder
from hf_pss.runs.folder import MARKER, MAX_FILES, OPTIONS_FILE, STATE_FILE, SUPERSEDED, leads_out
from hf_pss.runs.log import read_state
from hf_pss.runs.options import options_file, read_options
from hf_pss.runs.safetensors_files import Checkpoint, open_checkpoint

__all__ = ["RECORD_FILE", "Repairs", "Written", "as_json", "write_repaired"]

RECORD_FILE = "hf_pss_rescue.json"
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
    """
    _check(chosen, target, options)
    source = chosen.path.resolve()
    for name in (STATE_FILE, MARKER, OPTIMIZER, SCHEDULER):
        _refuse_outside(source, source / name)
    checkpoint = open_checkpoint(source)
    if options.smoothing != "none":
        matrices_to_smooth(checkpoint)  # raises before anything is written
    with new_folder(target, like=source) as folder:
        repairs = write_weights(checkpoint, source, folder, options.smoothing)
        done = {entry.path.relative_to(source) for entry in checkpoint.tensors}
        done |= _write_optimizer(source, folder, options)
        own = {Path(name) for name in (STATE_FILE, MARKER, SUPERSEDED)}
        left_out = _copy_others(source, folder, done | own)
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
    if not options.needs_pickle:
        return
    if not options.allow_pickle:
        raise ConfigurationError(
            "--moments reset and --lr-scale change optimizer.pt and scheduler.pt, which are "
            "pickles. Add --allow-pickle if you trust the source of the checkpoint. They are "
            "opened with weights_only=True."
        )
    require_torch()


def _write_optimizer(source: Path, folder: Path, options: Repairs) -> set[Path]:
    """Write the optimizer and schedule files that change, and return their names."""
    done = set()
    if options.needs_pickle:
        rewrite_optimizer(
            source / OPTIMIZER,
            folder / OPTIMIZER,
            moments=options.moments,
            lr_scale=options.lr_scale,
        )
        done.add(Path(OPTIMIZER))
    if options.lr_scale != 1.0:
        rewrite_scheduler(source / SCHEDULER, folder / SCHEDULER, lr_scale=options.lr_scale)
        done.add(Path(SCHEDULER))
    return done


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
            "The measure was noise of their shapes. Sound weights lie below that too, pretrained "
            "ones above all, so if these are not damaged, --smoothing none is better."
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
