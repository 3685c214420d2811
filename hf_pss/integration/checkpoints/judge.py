"""Whether a Trainer can go on from a checkpoint: complete, readable, finite; and what it lacks.

The one place where this is decided, for resuming, for rolling back and for `hf-pss rescue`. Where
there is a marker, sizes are compared with it, and numbers are believed to be finite. Where there is
none, as in a plain Trainer's checkpoint, every file is judged by what it says of itself: headers of
safetensors against sizes, and all their numbers for NaN and inf. Of a ``.pt`` file, a ZIP archive,
the beginning, the end and where its directory begins are looked at, a few bytes each, which a file
that was cut short has not all. No pickle is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.checkpoint import open_checkpoint
from hf_pss.inspection.names import visible
from hf_pss.inspection.reading import READABLE, read_pieces
from hf_pss.inspection.strict_json import read_object
from hf_pss.integration.checkpoints.marker import Marker, changed_files, read_marker

__all__ = [
    "STATE_FILE",
    "Examination",
    "Layout",
    "checkpoints_by_step",
    "examine",
    "layout_of",
    "recorded_step",
    "step_by_name",
    "unfit_files",
    "unfit_state",
]

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
