"""The completion marker: the last file of a checkpoint, and what it vouches for.

``pss_complete.json`` names every file of the checkpoint with its size, and says that weights and
optimizer state were finite when they were saved. It is written after everything else is on the disk
and before the checkpoint gets its name, so a folder that has it was complete.

Whether a Trainer can go on from a checkpoint: complete, readable, finite; and what it lacks.

The one place where this is decided, for resuming, for rolling back and for `hf-pss rescue`. Where
there is a marker, sizes are compared with it, and numbers are believed to be finite. Where there is
none, as in a plain Trainer's checkpoint, every file is judged by what it says of itself: headers of
safetensors against sizes, and all their numbers for NaN and inf. Of a ``.pt`` file, a ZIP archive,
the beginning, the end and where its directory begins are looked at, a few bytes each, which a file
that was cut short has not all. No pickle is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from hf_pss.detection.state import check_version, read_integer, read_mapping
from hf_pss.detection.state import read_object as read_keys
from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.records.strict_json import read_object, visible
from hf_pss.runs.safetensors_files import READABLE, open_checkpoint, read_pieces

__all__ = [
    "MARKER",
    "STATE_FILE",
    "Examination",
    "Layout",
    "Marker",
    "changed_files",
    "checkpoints_by_step",
    "examine",
    "layout_of",
    "read_marker",
    "recorded_step",
    "step_by_name",
    "unfit_files",
    "unfit_state",
    "write_marker",
]

MARKER = "pss_complete.json"
_VERSION = 1
# DeepSpeed writes a few files a rank: this is room for 10,000 ranks.
_MAX_BYTES = 16 * 2**20
_MAX_JSON_BYTES = 32 * 2**20  # as an index of safetensors may have
# What the Trainer, Accelerate, PEFT and DeepSpeed read when they resume (transformers 5.23).
_RESUMED = re.compile(
    r"(.*/)?([^/]*\.(safetensors|bin|pt|pth|distcp|index\.json)|latest|\.metadata"
    r"|(trainer_state|config|adapter_config)\.json)$"
)
_NOT_RESUMED = "training_args.bin"
_READ_BY_THE_JUDGE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Marker:
    """What was true when the checkpoint was written."""

    step: int
    files: Mapping[str, int]
    """Every file by its path inside the checkpoint, and its size in bytes."""


def write_marker(folder: Path, *, step: int) -> None:
    """Write the marker and bring it to the disk; everything else must be there already.

    Raises:
        OSError: It cannot be written.
    """
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(MARKER, None)
    text = json.dumps({"version": _VERSION, "step": step, "files": files}, allow_nan=False)
    with (folder / MARKER).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a checkpoint; None where it has none, as those of a plain Trainer.

    Raises:
        StateError: The marker is damaged or of a later version.
        OSError: It cannot be read.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    what = f"{path.parent.name}/{MARKER}"
    found = read_object(path, max_bytes=_MAX_BYTES)
    check_version(found, _VERSION, what=what)
    fields = read_keys(found, ("version", "step", "files"), what=what)
    sizes = read_mapping(fields["files"], what=f"'files' of {what}")
    files = {}
    for name, size in sizes.items():
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or "\\" in name or "\0" in name:
            raise StateError(f"{what} names a file outside of the checkpoint: it is damaged.")
        files[name] = read_integer(size, what=f"the size of a file of {what}")
    return Marker(read_integer(fields["step"], what=f"'step' of {what}"), files)


def changed_files(folder: Path, marker: Marker) -> dict[str, str]:
    """Return the files that are no longer what was written, each with what is wrong.

    Only of what a resume reads: a README.md, a chat template or a tokenizer may change. JSON may
    have been edited by hand, as people do with trainer_state.json: it must be readable JSON.
    Anything else must have the size that it had. Contents are not compared.
    """
    wrong = {}
    for name, size in marker.files.items():
        path = folder / name
        if not _RESUMED.fullmatch(name) or path.name == _NOT_RESUMED:
            continue
        if not path.is_file():
            wrong[name] = "is missing"
        elif (found := path.stat().st_size) == size:
            continue
        elif name == _READ_BY_THE_JUDGE:
            continue
        elif path.suffix != ".json":
            wrong[name] = f"has {found} bytes of {size}"
        elif not _is_json(path):
            wrong[name] = "is damaged JSON"
    return wrong


def _is_json(path: Path) -> bool:
    try:
        read_object(path, max_bytes=_MAX_JSON_BYTES, allow_nonfinite=True)
    except StateError:
        return False
    return True


Layout: TypeAlias = Literal["whole", "fsdp_full", "fsdp_sharded", "deepspeed", "none"]
"""What a resumed Trainer reads the weights from; ``none``: nothing that is known by its name."""

STATE_FILE = "trainer_state.json"
# As in transformers; ASCII digits, and no more than a step has.
_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_MAX_STATE_BYTES = 2**30
_MAX_FILES = 10_000
_ARCHIVES = (".pt", ".pth", ".bin")
_ARGUMENTS = "training_args.bin"  # which no resume reads
_WEIGHTS = re.compile(r"[^/]*\.safetensors(\.index\.json)?")
# What a Trainer looks for when it loads weights.
_LOADED = (
    "model.safetensors",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_SHARDED_WEIGHTS, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_FULL_WEIGHTS = "pytorch_model_fsdp.bin"
_STEPS_OF_DEEPSPEED = "global_step*"
# Files without which the Trainer begins this part anew, and says nothing (transformers 5.23).
_TRAINING_STATE = re.compile(
    r"(optimizer\.(pt|bin)|scheduler\.pt|optimizer_0/.*|rng_state.*\.pth)$"
)
# Of a ZIP archive (APPNOTE 6.3.10, 4.3.7, 4.3.12, 4.3.16). torch leaves no comment at its end.
_FIRST_FILE, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_BYTES = 22
_OFFSET = slice(16, 20)
_SAID_ELSEWHERE = 2**32 - 1  # in the record of ZIP64, beyond 4 GiB


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about one checkpoint."""

    path: Path
    step: int
    is_marked: bool
    """Whether PSS wrote it."""
    problem: str | None = None
    """Why nothing can go on from it."""
    lacks: tuple[str, ...] = ()
    """What of the optimizer's and the schedule's state would begin anew."""

    @property
    def is_whole(self) -> bool:
        """Whether a run goes on from it as if it had never stopped."""
        return self.problem is None and not self.lacks

    @property
    def why_not(self) -> str:
        """What speaks against it, in words; empty where nothing does."""
        return self.problem or "; ".join(self.lacks)


def checkpoints_by_step(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, good or not, the oldest first, by the number in the name."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_by_name(path) or 0, path.name))


def step_by_name(folder: Path) -> int | None:
    """Return the N of ``checkpoint-N``; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def examine(folder: Path) -> Examination:
    """Judge one checkpoint.

    Cost: a look at the sizes and at a few bytes of each archive; without a marker, one read of the
    weights besides. Never raises for what is wrong with the checkpoint.
    """
    step, marker = step_by_name(folder) or 0, None
    try:
        marker = read_marker(folder)
        step = recorded_step(folder)
        wrong = unfit_files(folder, marker)
        rewritten = [name for name in wrong if _WEIGHTS.fullmatch(name)]
        if marker is None:
            wrong |= _bad_weights(folder)
        elif rewritten and _has_weights(folder) and not _bad_weights(folder):
            # Somebody has sharded, merged or converted them: whole and finite by their own account.
            wrong = {name: why for name, why in wrong.items() if name not in rewritten}
    except (PSSError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Examination(folder, step, marker is not None, f"{visible(reason)}")
    fatal = {name: why for name, why in wrong.items() if not _TRAINING_STATE.fullmatch(name)}
    if fatal:
        return Examination(folder, step, marker is not None, _in_words(fatal))
    lacks = tuple(_in_words({name: why}) for name, why in wrong.items())
    return Examination(folder, step, marker is not None, lacks=lacks)


def _in_words(wrong: dict[str, str]) -> str:
    return "; ".join(f"{visible(name)} {why}" for name, why in list(wrong.items())[:3])


def recorded_step(folder: Path) -> int:
    """Return the step that a checkpoint's trainer_state.json names.

    Raises:
        StateError: It is missing or damaged.
        OSError: It cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise StateError(f"{STATE_FILE} is missing")
    step = read_object(path, max_bytes=_MAX_STATE_BYTES, allow_nonfinite=True).get("global_step")
    if type(step) is not int or step < 0:
        raise StateError(f"{STATE_FILE} names no step")
    return step


def layout_of(folder: Path) -> Layout:
    """Return what the Trainer that wrote a checkpoint would resume its weights from."""
    if any(folder.glob(_STEPS_OF_DEEPSPEED)):
        return "deepspeed"
    if (folder / _SHARDED_WEIGHTS).is_dir():
        return "fsdp_sharded"
    if (folder / _FULL_WEIGHTS).exists():
        return "fsdp_full"
    return "whole" if any(folder.glob("*.safetensors*")) else "none"


def unfit_files(folder: Path, marker: Marker | None) -> dict[str, str]:
    """Return the files that a resumed Trainer lacks or cannot read, each with what is wrong.

    Safetensors are looked at by their sizes alone, and only where there is a marker.

    Raises:
        OSError: The folder cannot be read.
    """
    wrong = {} if marker is None else changed_files(folder, marker)
    for path in sorted(islice(folder.rglob("*"), _MAX_FILES)):
        if path.suffix not in _ARCHIVES or path.name == _ARGUMENTS or not path.is_file():
            continue
        if (reason := _why_no_archive(path)) is not None:
            wrong.setdefault(path.relative_to(folder).as_posix(), reason)
    for name in _needed(folder):
        if not (folder / name).is_file():
            wrong.setdefault(name, "is missing")
    return wrong


def unfit_state(folder: Path) -> dict[str, str]:
    """Return the files of the optimizer's, the schedule's and the random state that are unfit.

    Raises:
        StateError: The marker is damaged.
        OSError: The folder cannot be read.
    """
    wrong = unfit_files(folder, read_marker(folder))
    return {name: why for name, why in wrong.items() if _TRAINING_STATE.fullmatch(name)}


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _LOADED)


def _needed(folder: Path) -> Iterator[str]:
    """Name the files without which a Trainer stops, or begins anew without a word."""
    layout = layout_of(folder)
    if layout == "deepspeed":  # which keeps all of it in a folder of the step
        yield "latest"
        return
    if layout == "fsdp_sharded":
        yield f"{_SHARDED_WEIGHTS}/.metadata"
        yield f"{_SHARDED_OPTIMIZER}/.metadata"
    elif layout == "fsdp_full":
        yield "optimizer.bin"
    elif layout == "whole" or not (folder / "optimizer.bin").is_file():
        yield "optimizer.pt"
    yield "scheduler.pt"


def _why_no_archive(path: Path) -> str | None:
    """Say why a file is no whole ZIP archive, which torch has written since 1.6; None if it is."""
    cut = "was not written to its end"
    try:
        with path.open("rb") as stream:
            if stream.read(len(_FIRST_FILE)) != _FIRST_FILE:
                return cut
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _END_BYTES))
            end = stream.read(_END_BYTES)
            if not end.startswith(_END):
                return cut
            offset = int.from_bytes(end[_OFFSET], "little")
            if offset == _SAID_ELSEWHERE:
                return None
            stream.seek(offset)
            return None if stream.read(len(_DIRECTORY)) == _DIRECTORY else cut
    except OSError as error:
        return f"cannot be read: {visible(error.strerror)}"


def _bad_weights(folder: Path) -> dict[str, str]:
    """Return the first file of a checkpoint without a marker whose weights are none, and why."""
    if not any(folder.rglob("*.safetensors")):
        is_known = layout_of(folder) != "none"
        if is_known or any(any(folder.glob(name)) for name in _PICKLED_WEIGHTS):
            return {}
        return {"model.safetensors": "is missing, and there are no other weights"}
    try:
        tensors = open_checkpoint(folder).tensors
    except ConfigurationError:  # adapters, each in a folder of its own
        tensors = tuple(
            tensor
            for one in sorted(folder.glob("*/*.safetensors"))
            for tensor in open_checkpoint(one).tensors
        )
    for tensor in tensors:
        if tensor.dtype in READABLE and not all(
            bool(piece.float().isfinite().all()) for piece in read_pieces(tensor)
        ):
            return {tensor.path.name: f"holds NaN or inf, in {visible(tensor.name)}"}
    return {}
