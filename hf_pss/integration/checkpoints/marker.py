"""The completion marker: the last file of a checkpoint, and what it vouches for.

``pss_complete.json`` names every file of the checkpoint with its size, and says that weights and
optimizer state were finite when they were saved. It is written after everything else is on the disk
and before the checkpoint gets its name, so a folder that has it was complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hf_pss.detection.state import check_version, read_integer, read_mapping
from hf_pss.detection.state import read_object as read_keys
from hf_pss.errors import StateError
from hf_pss.inspection.strict_json import read_object

__all__ = ["MARKER", "Marker", "changed_files", "read_marker", "write_marker"]

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
