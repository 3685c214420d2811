"""Write a repaired copy of a checkpoint: whole or not at all, and never over anything.

Everything is written into a temporary folder beside the target, trainer_state.json and the marker
last, each file is forced to the disk, and the folder is renamed: a crash leaves either no copy or a
complete one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_pss.errors import ConfigurationError, StateError
from hf_pss.records.strict_json import read_object, visible
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.optimizer_files import (
    OPTIMIZER,
    SCHEDULER,
    Moments,
    refuse_project,
    require_torch,
    rewrite_optimizer,
    rewrite_scheduler,
)
from hf_pss.rescue.smoothed_weights import Repair, matrices_to_smooth, summary, write_weights
from hf_pss.runs.checkpoint import MARKER, read_marker, write_marker
from hf_pss.runs.log import MAX_STATE_BYTES, STATE_FILE, leads_out
from hf_pss.runs.options import MAX_OPTIONS_BYTES, OPTIONS_FILE, options_file
from hf_pss.runs.rotation import SUPERSEDED
from hf_pss.runs.safetensors_files import Checkpoint, open_checkpoint

__all__ = ["RECORD_FILE", "Repairs", "Written", "as_json", "write_repaired"]

RECORD_FILE = "hf_pss_rescue.json"
# A pickle of the arguments, which nothing needs to resume; and weights that were not smoothed.
_LEFT_OUT = ("training_args.bin", "pytorch_model*.bin", "adapter_model.bin", "tf_model.h5")
_MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Repairs:
    """What is to be done."""

    smoothing: str = "none"
    """``floor``, with noise as the measure, which sound weights lie below, too; the name of a
    smoothing function; or ``none``."""
    moments: Moments = "keep"
    lr_scale: float = 1.0
    skip_batches: int = 0
    """Of update steps: a step of accumulated gradients takes several of the data loader's."""
    allow_pickle: bool = False

    @property
    def needs_pickle(self) -> bool:
        """Whether optimizer.pt must be opened."""
        return self.moments != "keep" or self.lr_scale != 1.0


@dataclass(frozen=True, slots=True)
class Written:
    """What was done."""

    path: Path
    source: Path
    step: int
    """That the copy resumes from."""
    repairs: tuple[Repair, ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


def write_repaired(chosen: CheckpointReport, target: Path, options: Repairs) -> Written:
    """Write the copy.

    Args:
        chosen: A complete, finite checkpoint of one process or DDP.
        target: Does not exist; its parent does.
        options: What to repair.

    Raises:
        ConfigurationError: The layout is sharded, the target exists or lies in the checkpoint, or
            an option needs what it may not open.
        IncompatibleVersionError: torch is too old to open a pickle.
        StateError: A file is damaged, or a link leads out of the checkpoint.
        OSError: Reading or writing failed; nothing is left behind.
    """
    _check(chosen, target, options)
    source = chosen.path.resolve()
    for name in (STATE_FILE, MARKER, OPTIMIZER, SCHEDULER):
        _refuse_outside(source, source / name)
    checkpoint = open_checkpoint(source)
    if options.smoothing != "none":
        matrices_to_smooth(checkpoint)  # refuse before anything is written
    with _temporary(target, like=source) as folder:
        repairs = write_weights(checkpoint, source, folder, options.smoothing)
        done = {entry.path.relative_to(source) for entry in checkpoint.tensors}
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
        left_out = _copy_others(
            source, folder, {*done, Path(STATE_FILE), Path(MARKER), Path(SUPERSEDED)}
        )
        _copy_run_options(source, folder)
        _check_names(checkpoint, folder)
        step = chosen.step + options.skip_batches
        written = Written(
            path=target,
            source=source,
            step=step,
            repairs=tuple(repairs),
            left_out=left_out,
            remarks=tuple(_remarks(options, repairs, left_out)),
        )
        record = {**asdict(options), **as_json(written)}
        (folder / RECORD_FILE).write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
        _sync_files(folder)
        _write_state(source / STATE_FILE, folder / STATE_FILE, options.skip_batches)
        _sync_files(folder)
        if read_marker(source) is not None:  # of a plain Trainer's checkpoint nothing is vouched
            write_marker(folder, step=step)
            _sync(folder)
    return written


def as_json(written: Written) -> dict[str, Any]:
    """Return plain data."""
    return {
        "path": str(written.path),
        "source": str(written.source),
        "step": written.step,
        "matrices": [asdict(one) for one in written.repairs],
        "left_out": list(written.left_out),
        "remarks": list(written.remarks),
    }


def _check(chosen: CheckpointReport, target: Path, options: Repairs) -> None:
    if chosen.layout != "whole":
        raise ConfigurationError(
            f"{visible(chosen.path)} is of the layout {chosen.layout}; copies are written of "
            "checkpoints of one process and of DDP. Use the command that is printed without "
            "--write: it smooths under every backend."
        )
    if target.exists() or target.is_symlink():
        raise ConfigurationError(f"{visible(target)} exists. Give a folder that does not.")
    if not target.parent.is_dir():
        raise ConfigurationError(f"There is no folder {visible(target.parent)} to write into.")
    if target.resolve().is_relative_to(chosen.path.resolve()):
        raise ConfigurationError(f"{visible(target)} lies in the checkpoint that it is made of.")
    if options.moments == "project":
        refuse_project()
    if not options.needs_pickle:
        return
    if not options.allow_pickle:
        raise ConfigurationError(
            "--moments reset and --lr-scale change optimizer.pt and scheduler.pt, which are "
            "pickles. Add --allow-pickle if you trust where the checkpoint comes from; they are "
            "opened with weights_only=True."
        )
    require_torch()


@contextmanager
def _temporary(target: Path, *, like: Path) -> Iterator[Path]:
    """Give a folder that becomes `target` where nothing is raised, and is removed otherwise."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", dir=target.parent))
    try:
        yield folder
        if target.exists() or target.is_symlink():
            raise ConfigurationError(f"{visible(target)} was made while the copy was written.")
        folder.rename(target)
        shutil.copymode(like, target)  # not before: it may forbid writing
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_others(source: Path, folder: Path, done: set[Path]) -> tuple[str, ...]:
    left_out = []
    for number, path in enumerate(sorted(source.rglob("*"))):
        if number >= _MAX_FILES:
            raise StateError(f"{visible(source)} holds more than {_MAX_FILES} files.")
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
    """Copy the options of the run that lie beside a checkpoint: a copy may lie anywhere."""
    path = options_file(source)
    if path is None or path.parent == source:  # copied with all else
        return
    with suppress(StateError):  # nothing to go by
        read_object(path, max_bytes=MAX_OPTIONS_BYTES)
        shutil.copyfile(path, folder / OPTIONS_FILE)


def _write_state(source: Path, target: Path, skip: int) -> None:
    """Copy the Trainer's state, set forward: it passes over the data of as many steps as taken."""
    if not skip:
        shutil.copyfile(source, target)
        return
    state = read_object(source, max_bytes=MAX_STATE_BYTES, allow_nonfinite=True)
    step = state["global_step"]
    state["global_step"] = step + skip
    saved = state.get("stateful_callbacks")
    for name in ("PSSCallback", "attributes", "saved_state"):
        saved = saved.get(name) if isinstance(saved, dict) else None
    if isinstance(saved, dict) and saved.get("step") == step:
        saved["step"] = step + skip  # or PSS would take its state for that of another step
    # As transformers writes it: bare NaN where the log has one.
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
            "The measure was noise of their shapes, which sound weights lie below, too, pretrained "
            "ones above all: where these are not damaged, --smoothing none is better."
        )
    if options.moments == "reset":
        yield "The optimizer begins without state, at the rate of the schedule."
    if options.lr_scale != 1.0:
        yield f"Every learning rate is {options.lr_scale:g} times what it was; its course is kept."
    if options.skip_batches:
        yield (
            f"global_step is set forward by {options.skip_batches}: a resumed Trainer passes over "
            "as much more data, and ends as many updates earlier. The schedule stays where it was."
        )
    if left_out:
        yield f"Not copied: {', '.join(left_out[:5])}{'…' if len(left_out) > 5 else ''}."


def _sync_files(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
