"""Judge whether a Trainer can resume from a checkpoint: complete, readable and finite.

This is the only judge: for resuming, for rolling back, and for `hf-pss rescue`. It opens no pickle.

- PSS writes a marker as the last file of a checkpoint. The marker lists every file with its size
  and means that weights and optimizer state were finite. With a marker, only sizes are compared.
- A plain Trainer writes no marker. Then the safetensors' headers are compared with their sizes, and
  all their numbers are checked for NaN and inf.
- A ``.pt`` file is a ZIP archive. Its first bytes, its last bytes and the start of its directory
  are checked in both cases, which a file that was cut short does not pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from hf_pss.detection.state import check_version, read_integer, read_mapping
from hf_pss.detection.state import read_object as read_keys
from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.records.strict_json import read_object, reason_of, visible
from hf_pss.runs.durable import write_whole
from hf_pss.runs.folder import MARKER, MAX_FILES, MAX_INDEX_BYTES, STATE_FILE, step_by_name
from hf_pss.runs.log import read_state
from hf_pss.runs.safetensors_files import READABLE, Checkpoint, open_checkpoint, read_pieces

__all__ = [
    "PICKLED_WEIGHTS",
    "Examination",
    "Layout",
    "Marker",
    "changed_files",
    "examine",
    "layout_of",
    "open_weights",
    "read_marker",
    "recorded_step",
    "unfit_state",
    "write_marker",
]

Layout: TypeAlias = Literal["whole", "fsdp_full", "fsdp_sharded", "deepspeed", "none"]
"""How the weights are stored that a resumed Trainer reads; ``none``: in no known file."""

_VERSION = 1
# The files that the Trainer, Accelerate, PEFT and DeepSpeed read on resuming (transformers 5.23).
_RESUMED = re.compile(
    r"(.*/)?([^/]*\.(safetensors|bin|pt|pth|distcp|index\.json)|latest|\.metadata"
    r"|(trainer_state|config|adapter_config)\.json)$"
)
_ARCHIVES = (".pt", ".pth", ".bin")
_ARGUMENTS = "training_args.bin"  # no resume reads it
_WEIGHTS = re.compile(r"[^/]*\.safetensors(\.index\.json)?")
# The files that a Trainer looks for when it loads weights.
_LOADED = (
    *("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_SHARDED_WEIGHTS, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
# Without one of these files the Trainer restarts that part without a warning (transformers 5.23).
_TRAINING_STATE = re.compile(
    r"(optimizer\.(pt|bin)|scheduler\.pt|optimizer_0/.*|rng_state.*\.pth)$"
)
# Of a ZIP archive (APPNOTE 6.3.10, 4.3.7, 4.3.12, 4.3.16). torch leaves no comment at its end.
_FIRST_FILE, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_BYTES = 22
_OFFSET = slice(16, 20)
_IN_ZIP64_RECORD = 2**32 - 1  # beyond 4 GiB


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of the completion marker: the checkpoint as it was written."""

    step: int
    files: Mapping[str, int]
    """Every file's path inside the checkpoint, and its size in bytes."""


@dataclass(frozen=True, slots=True)
class Examination:
    """The result of judging one checkpoint."""

    path: Path
    step: int
    """By the folder's name; 0 for another name."""
    is_marked: bool
    """Whether PSS wrote it."""
    problem: str | None = None
    """Why no run can continue from it."""
    lacks: tuple[str, ...] = ()
    """The parts of the optimizer's, schedule's and random state that would start from scratch."""

    @property
    def is_whole(self) -> bool:
        """Whether a run continues from it as if it had never stopped."""
        return self.problem is None and not self.lacks

    @property
    def why_not(self) -> str:
        """The reasons against resuming from it; empty where there are none."""
        return self.problem or "; ".join(self.lacks)


def examine(folder: Path, *, reads_weights: bool = True) -> Examination:
    """Judge one checkpoint.

    Cost: file sizes and a few bytes of each archive; without a marker, also one read of the
    weights. Never raises for a fault of the checkpoint.

    Args:
        folder: The checkpoint.
        reads_weights: Read the weights of a checkpoint without a marker. False is for a caller
            that measures them itself.
    """
    step, marker = step_by_name(folder) or 0, None
    try:
        marker = read_marker(folder)
        recorded_step(folder)
        wrong = _unfit_files(folder, marker)
        rewritten = [name for name in wrong if _WEIGHTS.fullmatch(name)]
        if marker is None:
            wrong |= _bad_weights(folder) if reads_weights else {}
        elif rewritten and _has_weights(folder) and not _bad_weights(folder):
            # Another program has sharded, merged or converted them, and they are finite.
            wrong = {name: why for name, why in wrong.items() if name not in rewritten}
    except (PSSError, OSError) as error:
        return Examination(folder, step, marker is not None, reason_of(error))
    reasons = {name: f"{visible(name)} {why}" for name, why in wrong.items()}
    lacks = tuple(why for name, why in reasons.items() if _TRAINING_STATE.fullmatch(name))
    fatal = [why for name, why in reasons.items() if not _TRAINING_STATE.fullmatch(name)]
    if fatal:
        return Examination(folder, step, marker is not None, "; ".join(fatal[:3]))
    return Examination(folder, step, marker is not None, lacks=lacks)


def recorded_step(folder: Path) -> int:
    """Return the step in a checkpoint's trainer_state.json.

    Raises:
        StateError: The file is missing or damaged.
        OSError: The file cannot be read.
    """
    return int(read_state(folder / STATE_FILE)["global_step"])


def unfit_state(folder: Path) -> dict[str, str]:
    """Return the unfit files of the optimizer's, schedule's and random state, each with the reason.

    Raises:
        StateError: The marker is damaged.
        OSError: The folder cannot be read.
    """
    wrong = _unfit_files(folder, read_marker(folder))
    return {name: why for name, why in wrong.items() if _TRAINING_STATE.fullmatch(name)}


def layout_of(folder: Path) -> Layout:
    """Return how the weights of a checkpoint are stored."""
    if any(folder.glob("global_step*")):
        return "deepspeed"
    if (folder / _SHARDED_WEIGHTS).is_dir():
        return "fsdp_sharded"
    if (folder / "pytorch_model_fsdp.bin").exists():
        return "fsdp_full"
    return "whole" if any(folder.glob("*.safetensors*")) else "none"


def open_weights(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint's safetensors, or of adapters in folders of their own.

    Each tensor of such an adapter gets its folder's name as a prefix.

    Raises:
        ConfigurationError: There are no safetensors.
        StateError: A file is damaged.
        OSError: A file cannot be read.
    """
    try:
        return open_checkpoint(folder)
    except ConfigurationError:
        adapters = [open_checkpoint(path) for path in sorted(folder.glob("*/*.safetensors"))]
        if not adapters:
            raise
    tensors = (
        replace(tensor, name=f"{tensor.path.parent.name}/{tensor.name}")
        for one in adapters
        for tensor in one.tensors
    )
    return Checkpoint(folder, tuple(tensors), {})


def write_marker(folder: Path, *, step: int) -> None:
    """Write the marker of a checkpoint and flush it. All other files must be on the disk already.

    Raises:
        OSError: The marker cannot be written.
    """
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(MARKER, None)
    text = json.dumps({"version": _VERSION, "step": step, "files": files}, allow_nan=False)
    write_whole(folder / MARKER, f"{text}\n")


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a checkpoint, or None where it has none, as from a plain Trainer.

    Raises:
        StateError: The marker is damaged or of a later version.
        OSError: The marker cannot be read.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    what = f"{path.parent.name}/{MARKER}"
    found = read_object(path, max_bytes=MAX_INDEX_BYTES)
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
    """Return the files that have changed since the marker was written, each with the reason.

    Only files that a resume reads count: a README.md, a chat template or a tokenizer may change.
    People edit JSON by hand, such as trainer_state.json, so its size may change as long as it is
    readable. Any other file must have the size that it had. Contents are not compared.
    """
    wrong = {}
    for name, size in marker.files.items():
        path = folder / name
        if not _RESUMED.fullmatch(name) or path.name == _ARGUMENTS:
            continue
        if not path.is_file():
            wrong[name] = "is missing"
        elif (found := path.stat().st_size) == size or name == STATE_FILE:
            continue  # the judge reads trainer_state.json in any case
        elif path.suffix != ".json":
            wrong[name] = f"has {found} bytes of {size}"
        elif not _is_json(path):
            wrong[name] = "is damaged JSON"
    return wrong


def _is_json(path: Path) -> bool:
    try:
        read_object(path, max_bytes=MAX_INDEX_BYTES, allow_nonfinite=True)
    except StateError:
        return False
    return True


def _unfit_files(folder: Path, marker: Marker | None) -> dict[str, str]:
    """Return the files that a resumed Trainer lacks or cannot read, each with the reason."""
    wrong = {} if marker is None else changed_files(folder, marker)
    for path in sorted(islice(folder.rglob("*"), MAX_FILES)):
        if path.suffix not in _ARCHIVES or path.name == _ARGUMENTS or not path.is_file():
            continue
        if (reason := _why_no_archive(path)) is not None:
            wrong.setdefault(path.relative_to(folder).as_posix(), reason)
    for name in _needed(folder):
        if not (folder / name).is_file():
            wrong.setdefault(name, "is missing")
    return wrong


def _needed(folder: Path) -> Iterator[str]:
    """Yield the files without which a Trainer stops, or restarts a part without a warning."""
    layout = layout_of(folder)
    if layout == "deepspeed":  # keeps all of its state in a folder of the step
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
    """Return why a file is not a whole ZIP archive, the format of torch since 1.6."""
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
            if offset == _IN_ZIP64_RECORD:
                return None
            stream.seek(offset)
            return None if stream.read(len(_DIRECTORY)) == _DIRECTORY else cut
    except OSError as error:
        return f"cannot be read: {reason_of(error)}"


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _LOADED)


def _bad_weights(folder: Path) -> dict[str, str]:
    """Return the first weight file that holds NaN or inf, or is missing, with the reason."""
    if not any(folder.rglob("*.safetensors")):
        is_known = layout_of(folder) != "none"
        if is_known or any(any(folder.glob(name)) for name in PICKLED_WEIGHTS):
            return {}
        return {"model.safetensors": "is missing, and there are no other weights"}
    for tensor in open_weights(folder).tensors:
        if tensor.dtype in READABLE and not all(
            bool(piece.float().isfinite().all()) for piece in read_pieces(tensor)
        ):
            return {tensor.path.name: f"holds NaN or inf, in {visible(tensor.name)}"}
    return {}
