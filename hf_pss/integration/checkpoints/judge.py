"""Whether a Trainer can go on from a checkpoint: complete, readable, finite; and what it lacks.

Where there is a marker it is compared with the files, which costs a look at their sizes. Where
there is none, as in a plain Trainer's checkpoint, every file is judged by what it says of itself:
headers of safetensors against sizes, and all their numbers for NaN and inf; of a ``.pt`` file,
which is a ZIP archive, the directory at its end, which a file that was cut short has lost. No
pickle is opened.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.checkpoint import open_checkpoint
from hf_pss.inspection.names import visible
from hf_pss.inspection.reading import READABLE, read_pieces
from hf_pss.inspection.strict_json import read_object
from hf_pss.integration.checkpoints.marker import Marker, changed_files, read_marker

__all__ = ["Examination", "checkpoints_by_step", "examine", "recorded_step"]

_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_STATE = "trainer_state.json"
_MAX_STATE_BYTES = 2**30
_ARCHIVES = (".pt", ".pth", ".bin")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_SHARDED_WEIGHTS, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
# Files without which the Trainer begins this part anew, and says nothing (transformers 5.23).
_TRAINING_STATE = re.compile(
    r"(optimizer\.(pt|bin)|scheduler\.pt|optimizer_0/.*|rng_state.*\.pth)$"
)


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
    return sorted(found, key=_step_of)


def examine(folder: Path) -> Examination:
    """Judge one checkpoint.

    Cost: a look at the sizes where there is a marker, and one read of the weights where there is
    none. Never raises for what is wrong with the checkpoint.
    """
    step, marker = _step_of(folder), None
    try:
        marker = read_marker(folder)
        step = recorded_step(folder)
        wrong = changed_files(folder, marker) if marker else dict(_unreadable(folder))
    except (PSSError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Examination(folder, step, marker is not None, f"{visible(reason)}")
    fatal = {name: why for name, why in wrong.items() if not _TRAINING_STATE.fullmatch(name)}
    if fatal:
        return Examination(folder, step, marker is not None, _in_words(fatal))
    lacks = [_in_words({name: why}) for name, why in wrong.items()]
    lacks += [what for what in _absent(folder, marker) if what.split()[0] not in wrong]
    return Examination(folder, step, marker is not None, lacks=tuple(lacks))


def _in_words(wrong: dict[str, str]) -> str:
    return "; ".join(f"{visible(name)} {why}" for name, why in list(wrong.items())[:3])


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def recorded_step(folder: Path) -> int:
    """Return the step that a checkpoint's trainer_state.json names.

    Raises:
        StateError: It is missing or damaged.
        OSError: It cannot be read.
    """
    path = folder / _STATE
    if not path.is_file():
        raise StateError(f"{_STATE} is missing")
    step = read_object(path, max_bytes=_MAX_STATE_BYTES, allow_nonfinite=True).get("global_step")
    if type(step) is not int or step < 0:
        raise StateError(f"{_STATE} names no step")
    return step


def _absent(folder: Path, marker: Marker | None) -> Iterator[str]:
    """Name what a Trainer would begin anew without a word."""
    if any(folder.glob("global_step*")):
        return  # DeepSpeed keeps all of it there
    has_optimizer = any((folder / name).is_file() for name in _OPTIMIZERS)
    if not has_optimizer and not (folder / _SHARDED_OPTIMIZER).is_dir():
        yield "optimizer.pt is missing"
    if not (folder / "scheduler.pt").is_file():
        yield "scheduler.pt is missing"


def _unreadable(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the files of a checkpoint without a marker that cannot be read, and why."""
    yield from _bad_weights(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _ARCHIVES and path.name != "training_args.bin" and path.is_file():
            if not _is_whole_archive(path):
                yield name, "was not written to its end"
    for name in (_SHARDED_WEIGHTS, _SHARDED_OPTIMIZER):
        if (folder / name).is_dir() and not (folder / name / ".metadata").is_file():
            yield f"{name}/.metadata", "is missing"


def _bad_weights(folder: Path) -> Iterator[tuple[str, str]]:
    is_sharded = (folder / _SHARDED_WEIGHTS).is_dir() or any(folder.glob("global_step*"))
    if not any(folder.rglob("*.safetensors")):
        if not is_sharded and not any(any(folder.glob(name)) for name in _PICKLED_WEIGHTS):
            yield "model.safetensors", "is missing, and there are no other weights"
        return
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
            yield tensor.path.name, f"holds NaN or inf, in {visible(tensor.name)}"
            return


def _is_whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:  # reads the directory at the end
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
