"""Decide whether a Trainer can resume from a checkpoint, and which checkpoints belong to a run.

Resuming, rolling back and `hf-pss rescue` all use this module. It opens no pickle. A Trainer can
resume from a checkpoint that is complete and finite:

- PSS writes a marker as the last file of a checkpoint. The marker lists every file with its size,
  and it means that the weights and the optimizer state were finite. If there is a marker, only
  sizes are compared.
- A plain Trainer writes no marker. In this case the headers of the safetensors files are compared
  with the file sizes, and all numbers are checked for NaN and inf.
- A ``.pt`` file is a ZIP archive. In both cases its first bytes, its last bytes and the start of
  its directory are checked. A file that was cut short fails this check.

A run may start in the folder of an earlier run and find checkpoints of later steps there. Once the
new run has saved a checkpoint, those older checkpoints do not count as the newest ones, regardless
of their step numbers and dates.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from hf_pss.detection.state import check_version, read_integer, read_mapping
from hf_pss.detection.state import read_object as read_keys
from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.records.strict_json import read_object, reason_of, visible
from hf_pss.runs.folder import (
    ABANDONED,
    MARKER,
    MAX_FILES,
    MAX_INDEX_BYTES,
    MAX_STATE_BYTES,
    STATE_FILE,
    SUPERSEDED,
    checkpoints_by_step,
    remove_checkpoint,
    step_by_name,
    write_whole,
)
from hf_pss.runs.records_files import read_state
from hf_pss.runs.safetensors_files import READABLE, Checkpoint, count_nonfinite, open_checkpoint

logger = logging.getLogger(__name__)

Layout: TypeAlias = Literal["whole", "fsdp_full", "fsdp_sharded", "deepspeed", "none"]
"""How the weights that a resumed Trainer reads are stored. ``none`` means no known file."""

_VERSION = 1
# The Trainer, Accelerate, PEFT and DeepSpeed read these files on resuming (transformers 5.23).
_RESUMED = re.compile(
    r"(.*/)?([^/]*\.(safetensors|bin|pt|pth|distcp|index\.json)|latest|\.metadata"
    r"|(trainer_state|config|adapter_config)\.json)$"
)
# Those of them that torch.save writes. People put other .pt and .bin files into a checkpoint, too.
_ARCHIVE = re.compile(
    r"((optimizer|scheduler|scaler|(rng_state|random_states|pytorch_model)[^/]*|([^/]+/)?adapter_model)"
    r"|global_step[^/]*/[^/]+)\.(pt|pth|bin)"
)
_ARGUMENTS = "training_args.bin"  # no resume reads it
_WEIGHTS = re.compile(
    r"([^/]+/)?[^/]*\.safetensors(\.index\.json)?"
    r"|(pytorch_model(?!_fsdp)[^/]*|([^/]+/)?adapter_model)\.(bin|bin\.index\.json)"
)
# The files that a Trainer looks for when it loads weights.
_LOADED = (
    *("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
)
_ADAPTERS = ("*/adapter_model.safetensors", "*/adapter_model.bin")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
# One of several files of weights. Its name holds how many there are.
_NUMBERED = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})(\.safetensors|\.bin)")
# A file of one rank. Under DeepSpeed, only the names say how many ranks there were. Under FSDP2, a
# rank may have nothing to write, and the .metadata names the files.
_ZERO_FILE = re.compile(r"(.*zero_pp_rank_)([0-9]{1,5})(_mp_rank_([0-9]+)_.*_states\.pt)")
_RANDOM_STATE = re.compile(r"rng_state_([0-9]{1,5})\.pth")
_DISTRIBUTED_FILE = re.compile(rb"__[0-9]+_[0-9]+\.distcp")
_SHARDED_WEIGHTS, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
# If one of these files is missing, transformers 5.23 restarts that part without a warning.
_TRAINING_STATE = re.compile(
    r"(optimizer\.(pt|bin)|scheduler\.pt|optimizer_0/.*|rng_state.*\.pth)$"
)
# The signatures of a ZIP archive (APPNOTE 6.3.10, 4.3.7, 4.3.12, 4.3.16). torch writes no comment
# at the end of the archive.
_FIRST_FILE, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_BYTES = 22
_OFFSET = slice(16, 20)
_MAX_TAG_BYTES = 256  # the longest name of a folder
_IN_ZIP64_RECORD = 2**32 - 1  # the real offset is beyond 4 GiB


@dataclass(frozen=True, slots=True)
class Examination:
    """The result of examining one checkpoint."""

    path: Path
    step: int
    """The step in the name of the folder, or 0 if the name holds no step."""
    is_marked: bool
    """Whether the checkpoint has a marker of PSS."""
    problem: str | None = None
    """The reason why no run can continue from the checkpoint, or None."""
    lacks: tuple[str, ...] = ()
    """The missing parts of the optimizer, schedule and random state, which would start fresh."""
    has_only_weights: bool = False
    """Whether it was saved without these parts, as with save_only_model=True."""

    @property
    def is_whole(self) -> bool:
        """Whether a run can continue from the checkpoint as if it had never stopped."""
        return self.problem is None and not self.lacks

    @property
    def why_not(self) -> str:
        """The reasons against resuming from the checkpoint. Empty if there are none."""
        only = "it holds only weights, as save_only_model=True saves them"
        return self.problem or (only if self.has_only_weights else "; ".join(self.lacks))


def examine(folder: Path, *, reads_weights: bool = True) -> Examination:
    """Examine one checkpoint.

    The function reads file sizes and a few bytes of each archive. For a checkpoint without a
    marker, it also reads the weights once. It never raises an exception for a damaged checkpoint.

    Args:
        folder: The folder of the checkpoint.
        reads_weights: Whether to read the weights of a checkpoint without a marker. A caller that
            measures the weights itself passes False.
    """
    step, marker = _step_of(folder), None
    fatal, lacks = list[str](), list[str]()
    try:
        marker = read_marker(folder)
        recorded_step(folder)
        wrong = _unfit_files(folder, marker)
        rewritten = [name for name in wrong if _WEIGHTS.fullmatch(name)]
        if marker is None:
            wrong |= _bad_weights(folder) if reads_weights else {}
        elif rewritten and _has_loadable(folder):
            if not _bad_weights(folder):
                # Another program has sharded, merged or converted the weights; they are finite.
                wrong = {name: why for name, why in wrong.items() if name not in rewritten}
        for name, why in wrong.items():
            is_state = _TRAINING_STATE.fullmatch(name)
            (lacks if is_state else fatal).append(f"{visible(name)} {why}")
    except (PSSError, OSError) as error:
        fatal = [reason_of(error)]
    if fatal:
        return Examination(folder, step, marker is not None, "; ".join(fatal[:3]))
    names = marker if marker is not None else os.listdir(folder)
    only_weights = bool(lacks) and not any(map(_TRAINING_STATE.fullmatch, names))
    return Examination(folder, step, marker is not None, None, tuple(lacks), only_weights)


def recorded_step(folder: Path) -> int:
    """Return the step in a checkpoint's trainer_state.json.

    Raises:
        StateError: The file is missing or damaged.
        OSError: The file cannot be read.
    """
    return int(read_state(folder / STATE_FILE)["global_step"])


def unfit_state(folder: Path) -> dict[str, str]:
    """Return the missing or damaged files of the training state, each with the reason.

    The training state consists of the optimizer, the schedule and the random states.

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


def has_pickled_weights(folder: Path) -> bool:
    """Return whether a checkpoint holds weights in one of the formats `PICKLED_WEIGHTS`."""
    return any(any(folder.glob(name)) for name in PICKLED_WEIGHTS)


def open_weights(folder: Path) -> Checkpoint:
    """Read the headers of the safetensors files of a checkpoint.

    If the checkpoint holds its safetensors only in subfolders, as several adapters do, the headers
    in the subfolders are read. Each of these tensors gets the name of its folder as a prefix.

    Raises:
        ConfigurationError: The checkpoint holds no safetensors files.
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
    """Write the marker of a checkpoint and flush it, after all other files are on the disk.

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


def read_marker(folder: Path) -> dict[str, int] | None:
    """Return the sizes of all files when the marker of a checkpoint was written.

    The result is None if the checkpoint has no marker, because a plain Trainer wrote it.

    Raises:
        StateError: The marker is damaged or has a later version.
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
    read_integer(fields["step"], what=f"'step' of {what}")
    return files


def changed_files(folder: Path, marker: Mapping[str, int]) -> dict[str, str]:
    """Return the files that have changed since the marker was written, each with the reason.

    Only files that a resume reads are compared, so a README.md, a chat template or a tokenizer may
    change. People edit JSON files such as trainer_state.json by hand, so the size of a JSON file
    may change as long as the file is readable. Every other file must still have the recorded size.
    The contents are not compared.
    """
    wrong = {}
    for name, size in marker.items():
        path = folder / name
        if not _RESUMED.fullmatch(name) or path.name == _ARGUMENTS:
            continue
        if not path.is_file():
            wrong[name] = "is missing"
        elif (found := path.stat().st_size) == size or name == STATE_FILE:
            continue  # the caller reads trainer_state.json in any case
        elif path.suffix != ".json":
            wrong[name] = f"has {found} bytes of {size}"
        else:
            try:
                read_object(path, max_bytes=MAX_INDEX_BYTES, allow_nonfinite=True)
            except StateError:
                wrong[name] = "is damaged JSON"
    return wrong


def _unfit_files(folder: Path, marker: Mapping[str, int] | None) -> dict[str, str]:
    """Return the files that a resumed Trainer lacks or cannot read, each with the reason."""
    wrong = {} if marker is None else changed_files(folder, marker)
    for path in sorted(islice(folder.rglob("*"), MAX_FILES)):
        name = path.relative_to(folder).as_posix()
        if not _ARCHIVE.fullmatch(name) or not path.is_file():
            continue
        if (reason := _why_no_archive(path)) is not None:
            wrong.setdefault(name, reason)
    for name in _needed(folder):
        if not (folder / name).is_file():
            wrong.setdefault(name, "is missing")
    return wrong


def _needed(folder: Path) -> Iterator[str]:
    """Yield the files without which a Trainer stops, or restarts a part without a warning."""
    layout = layout_of(folder)
    if layout == "deepspeed":  # DeepSpeed keeps all of its state in one folder per step
        yield "latest"
        yield from _needed_of_zero(folder)
        return
    if layout == "fsdp_sharded":
        yield from _needed_of_fsdp(folder / _SHARDED_WEIGHTS)
        yield from _needed_of_fsdp(folder / _SHARDED_OPTIMIZER)
    elif layout == "fsdp_full":
        yield "optimizer.bin"
    elif layout == "whole" or not (folder / "optimizer.bin").is_file():
        yield "optimizer.pt"
    yield "scheduler.pt"
    if layout in ("whole", "none") and not _has_loadable(folder):
        for shard in filter(None, (_NUMBERED.fullmatch(path.name) for path in folder.iterdir())):
            stem, number, suffix = shard.groups()
            yield f"{stem}{suffix}.index.json"
            yield from (f"{stem}-{i:05}-of-{number}{suffix}" for i in range(1, int(number) + 1))
            return


def _needed_of_zero(folder: Path) -> Iterator[str]:
    """Yield the files that the ranks of DeepSpeed ZeRO have written, by the number of ranks."""
    if not (folder / "latest").is_file():
        return
    with (folder / "latest").open("rb") as stream:
        tag = stream.read(_MAX_TAG_BYTES).decode(errors="replace").strip()
    step = folder / tag
    if step.parent != folder or not step.is_dir():
        yield f"the folder {visible(tag)} that latest names"
        return
    files = [found for path in step.iterdir() if (found := _ZERO_FILE.fullmatch(path.name))]
    ranks = {int(found[2]) for found in files}
    if all(int(found[4]) == 0 for found in files):  # no rank of a model-parallel group
        states = (_RANDOM_STATE.fullmatch(path.name) for path in folder.iterdir())
        ranks |= {int(state[1]) for state in states if state}
    for begin, end in sorted({(found[1], found[3]) for found in files}):
        for rank in range(1 + max(ranks)):
            yield f"{step.name}/{begin}{rank}{end}"


def _needed_of_fsdp(folder: Path) -> Iterator[str]:
    """Yield the files of a sharded state. The .metadata is a pickle, so it is only searched."""
    metadata = folder / ".metadata"
    yield f"{folder.name}/{metadata.name}"
    if metadata.is_file():
        with metadata.open("rb") as stream:
            names = _DISTRIBUTED_FILE.findall(stream.read(MAX_STATE_BYTES))
        yield from (f"{folder.name}/{name.decode()}" for name in sorted(set(names)))


def _has_loadable(folder: Path) -> bool:
    """Return whether a folder holds weights under a name that the Trainer looks for."""
    return any((folder / name).is_file() for name in _LOADED) or any(
        any(folder.glob(pattern)) for pattern in _ADAPTERS
    )


def _why_no_archive(path: Path) -> str | None:
    """Return why a file is not a complete ZIP archive, which is torch's format since 1.6."""
    try:
        with path.open("rb") as stream:
            begin, size = stream.read(len(_FIRST_FILE)), stream.seek(0, 2)
            stream.seek(max(0, size - _END_BYTES))
            end = stream.read(_END_BYTES)
            is_whole = begin == _FIRST_FILE and end.startswith(_END)
            offset = int.from_bytes(end[_OFFSET], "little")
            if is_whole and offset != _IN_ZIP64_RECORD:
                stream.seek(offset)
                is_whole = stream.read(len(_DIRECTORY)) == _DIRECTORY
    except OSError as error:
        return f"cannot be read: {reason_of(error)}"
    return None if is_whole else "was not written to its end"


def _bad_weights(folder: Path) -> dict[str, str]:
    """Return the first weight file that is missing or holds NaN or inf, with the reason."""
    if not any(folder.rglob("*.safetensors")):
        if layout_of(folder) != "none" or _has_loadable(folder):
            return {}
        return {"model.safetensors": "is missing, and there are no other weights"}
    for tensor in open_weights(folder).tensors:
        if tensor.dtype in READABLE and count_nonfinite(tensor):
            return {tensor.path.name: f"holds NaN or inf, in {visible(tensor.name)}"}
    return {}


def examine_newest_first(run_dir: Path, *, reads_weights: bool = True) -> Iterator[Examination]:
    """Examine the checkpoints of a run from the newest to the oldest, each when it is asked for.

    A checkpoint of an earlier run in the same folder has a problem that says so.

    Args:
        run_dir: The folder that holds the ``checkpoint-N`` folders.
        reads_weights: See `examine`.
    """
    earlier = "an earlier run wrote it, and a later run has saved here; to resume it, pass its path"
    for folder in reversed(checkpoints_by_step(run_dir)):
        if is_superseded(folder):
            yield Examination(folder, _step_of(folder), is_marked=False, problem=earlier)
        else:
            yield examine(folder, reads_weights=reads_weights)


def is_superseded(folder: Path) -> bool:
    """Return whether a later run has started in the same run folder and has saved there."""
    return (folder / SUPERSEDED).exists()


def claim_(folder: Path) -> None:
    """Remove the mark of an earlier run from a checkpoint, because a run continues from it."""
    try:
        (folder / SUPERSEDED).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be changed: %s.", folder, error)


def supersede_later_(run_dir: Path, *, step: int) -> None:
    """Mark checkpoints of steps after the one that was just saved, so that none is resumed."""
    for folder in checkpoints_by_step(run_dir):
        if _step_of(folder) <= step or is_superseded(folder):
            continue
        logger.warning(
            "%s is of an earlier run, because step %d was saved after it: "
            "resume_from_checkpoint=True will skip it.",
            folder,
            step,
        )
        try:
            (folder / SUPERSEDED).touch()
        except OSError as error:
            logger.warning("%s cannot be changed, and may be resumed: %s.", folder, error)


def rotate(run_dir: Path, *, limit: int | None, step: int, kept: Collection[str]) -> None:
    """Remove checkpoints beyond the limit, first those of an earlier run and then the oldest.

    Args:
        run_dir: The folder that holds the ``checkpoint-N`` folders.
        limit: The value of `save_total_limit`. If it is None or 0, nothing is removed.
        step: The step that was just saved.
        kept: The names of checkpoints that stay, even beyond the limit.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_by_step(run_dir)
    found.sort(key=lambda folder: _step_of(folder) <= step)  # a stable sort keeps the step order
    for folder in [one for one in found if one.name not in kept]:
        if len(found) <= limit:
            return
        logger.info("Removing %s: save_total_limit is %d.", folder, limit)
        try:
            remove_checkpoint(folder)
        except OSError as error:
            logger.warning("%s cannot be removed: %s.", folder, error)
        found.remove(folder)


@dataclass(frozen=True, slots=True)
class Lineage:
    """The checkpoints that belong to a run, in the order of saving.

    They are the checkpoint that the run was resumed from, older checkpoints in the same folder as
    that one, and the checkpoints that the run has saved. Some of them may have been removed since.
    The run does not return to any other checkpoint in its folder.
    """

    folders: tuple[Path, ...] = ()
    source: Path | None = None
    """The checkpoint that the run was resumed from, which may be in any folder. It is None for
    a new run."""

    @classmethod
    def of(cls, source: Path | None) -> Lineage:
        """Return the lineage of a run that is resumed from a checkpoint, or of a new run."""
        if source is None:
            return cls()
        step = step_by_name(source)
        beside = [] if step is None else checkpoints_by_step(source.parent)
        older = (path for path in beside if _step_of(path) < (step or 0))
        return cls((*(path for path in older if not is_superseded(path)), source), source)

    @property
    def names(self) -> set[str]:
        """The names of the checkpoint folders."""
        return {folder.name for folder in self.folders}

    def with_saved(self, folder: Path) -> Lineage:
        """Return the lineage extended by a checkpoint that was just saved."""
        return replace(self, folders=(*self.folders, folder))

    def up_to(self, step: int) -> Lineage:
        """Return the lineage without the checkpoints of later steps."""
        return replace(self, folders=tuple(f for f in self.folders if _step_of(f) <= step))

    def newest_before(self, step: int) -> Examination | None:
        """Return the newest complete checkpoint of an earlier step, and log the skipped ones."""
        for folder in reversed(self.folders):
            if not folder.is_dir():  # rotation has removed it
                continue
            found = examine(folder)
            if found.step >= step:
                continue
            if found.is_whole:
                return found
            logger.warning("Skipping %s: %s.", folder, found.why_not)
        return None

    def name_before(self, step: int) -> str | None:
        """Return the name of the last checkpoint before a step, complete or not."""
        return next((f.name for f in reversed(self.folders) if _step_of(f) < step), None)


def abandon(run_dir: Path, later: Iterable[Path]) -> bool:
    """Move checkpoints of a run to the folder `ABANDONED`, and remove its previous content.

    If a checkpoint cannot be moved, the function logs a warning and continues, because the rollback
    is more important.

    Returns:
        Whether any checkpoint was moved.
    """
    there = [path for path in later if path.parent == run_dir and path.is_dir()]
    if not there:
        return False
    folder, num_moved = run_dir / ABANDONED, 0
    shutil.rmtree(folder, ignore_errors=True)
    for path in there:
        try:
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
        except OSError as error:
            logger.warning(
                "%s cannot be moved, although interventions had begun to fail: %s.", path, error
            )
            continue
        num_moved += 1
        logger.warning(
            "%s was written after interventions began to fail. It was moved to %s, so that no run "
            "resumes from it.",
            path.name,
            folder,
        )
    return num_moved > 0


def _step_of(folder: Path) -> int:
    return step_by_name(folder) or 0
