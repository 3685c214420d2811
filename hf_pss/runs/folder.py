"""The names and size limits of the files in a run's folder, and how files are written into it.

Files and folders are written completely or not at all, even if the process or the power fails.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from hf_pss.errors import ConfigurationError
from hf_pss.records.strict_json import visible

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Written by the Trainer into the run's folder and into each checkpoint.
STATE_FILE = "trainer_state.json"
# Written by PSS beside the checkpoints.
EVENTS_FILE, HEALTH_FILE = "pss_events.jsonl", "pss_health.jsonl"
# It holds text of the training data. Uploads to the Hub leave out names that begin with an
# underscore.
SPIKES_FILE = "_pss_spikes.jsonl"
# Written by `hf-pss train`, and copied into a checkpoint by `hf-pss rescue --write`.
OPTIONS_FILE = "hf_pss_options.json"
# Written by a run of `hf-pss demo`.
METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"

# The last file that is written into a checkpoint: see `hf_pss.runs.checkpoint.write_marker`.
MARKER = "pss_complete.json"
# An empty file in a checkpoint. It disappears with the folder when the step is saved again.
SUPERSEDED = "pss_superseded"

# A checkpoint is written here and then renamed. The Trainer ignores such a name when it
# rotates checkpoints and when it resumes, and uploads to the Hub leave out names that begin
# with an underscore.
STAGING = "_pss_saving"
# An empty file in a checkpoint while the Trainer writes it.
UNFINISHED = "pss_unfinished"
# A run that saves holds a lock on this file. After a crash the file stays, but not the lock.
LOCK = "_pss_lock"
# Holds the checkpoints that were saved after interventions began to fail. No resume looks here.
ABANDONED = "_pss_abandoned"

# A file above its limit is not opened. Parsed JSON takes up to 25 times the memory of its text.
# A logged row takes 200 bytes, with PSS's numbers 600, so this holds 400,000 rows.
MAX_STATE_BYTES = 2**28
# Readers of JSON-lines files take one line at a time and stop at this limit, which is ten times the
# size of a long run's file. An intervention on 1,000 matrices takes 300 kB.
MAX_LINES_BYTES = 2**30
MAX_LINES = 2**20
MAX_LINE_BYTES = 16 * 2**20
# The index of a model of 90,000 tensors takes 9 MB. The marker of 10,000 ranks takes less.
MAX_INDEX_BYTES = 32 * 2**20
# A config.json or an options file takes a few thousand bytes.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_FILES = 10_000
_MAX_HOLDER_CHARACTERS = 300

# The pattern is that of transformers, but it allows only ASCII digits, and at most as many as a
# step can have.
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")

_REPLACED, _REMOVED = "replaced", "removed"
# Windows flushes only files that are open for writing. On other systems, opening read-only is
# enough, and it also works for read-only files.
_TO_FLUSH = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
# Some network and FUSE file systems cannot flush a folder and return one of these errors.
_NOTHING_TO_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def step_by_name(folder: Path) -> int | None:
    """Return the N of ``checkpoint-N``, or None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_by_step(run_dir: Path) -> list[Path]:
    """Return all ``checkpoint-N`` folders of a run, including damaged ones, sorted by N."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if step_by_name(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (step_by_name(path) or 0, path.name))


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path is outside of a folder after all links are followed."""
    # `os.path.realpath` is used because `Path.resolve` raises an error if links form a circle.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a complete file or nothing, text as UTF-8, and flush it to the disk.

    If `path` is a link, the file replaces the link and leaves its target alone.

    Raises:
        OSError: The file cannot be written. An existing file of the same name is unchanged.
    """
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` when the block ends without an error.

    Raises:
        OSError: The file cannot be written. An existing file of the same name is unchanged.
    """
    scratch = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.partial")
    try:
        with scratch.open("xb") as stream:  # "x" never overwrites a file or follows a link
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def new_folder(target: Path, *, like: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Args:
        target: A path that does not exist yet. Its parent folder must exist.
        like: An existing folder. `target` gets its permissions.

    Raises:
        ConfigurationError: Another program has created `target` in the meantime.
        OSError: The folder cannot be written. The temporary folder is removed.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", dir=target.parent))
    try:
        yield folder
        sync_tree(folder)
        if os.path.lexists(target):
            raise ConfigurationError(f"{visible(target)} was made while the copy was written.")
        folder.rename(target)
        shutil.copymode(like, target)  # last, because `like` may be read-only
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Flush a folder and all files and folders below it to the disk.

    Raises:
        OSError: A file or folder cannot be flushed. The files may be incomplete.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(Path(root, name), _TO_FLUSH)
        _sync_folder(Path(root))


def move_into_place(staged: Path, target: Path) -> None:
    """Rename a complete folder to its final name, and remove an older folder of that name.

    Args:
        staged: The folder ``<run>/_pss_saving/checkpoint-N``, already flushed to the disk.
        target: The final path ``<run>/checkpoint-N``.

    Raises:
        OSError: The folder cannot be renamed. An older folder gets its name back.
    """
    replaced = staged.parent / _REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)  # after a crash here, the staging folder holds the new checkpoint
    try:
        staged.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. A crash leaves it complete, or leaves no folder of its name.

    Raises:
        OSError: The folder cannot be renamed, and is unchanged.
    """
    removed = folder.parent / STAGING / _REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    removed.parent.mkdir(exist_ok=True)
    folder.rename(removed)
    shutil.rmtree(removed.parent, ignore_errors=True)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder while the block runs.

    The operating system releases the lock when the process ends, even if it is killed. If the
    folder or its file system cannot be locked, the block runs without a lock.

    Raises:
        ConfigurationError: Another process holds the lock.
    """
    path = run_dir / LOCK
    try:
        stream = path.open("a+", encoding="utf-8")
    except OSError:
        yield
        return
    with stream:
        _lock(stream, path)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _lock(stream: TextIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        # A record lock belongs to this process alone, so the forked workers of a data loader, which
        # may outlive it for some seconds, do not hold it.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
    except (BlockingIOError, PermissionError) as error:
        stream.seek(0)
        holder = visible(stream.read(_MAX_HOLDER_CHARACTERS)) or "another process"
        raise ConfigurationError(
            f"Another run is training in {visible(path.parent)} ({holder}). Both would write the "
            "same checkpoints. Give this run a different output_dir, or end the other run first."
        ) from error
    except OSError:
        return  # some network file systems have no locks


def _sync_folder(folder: Path) -> None:
    """Flush the list of names in a folder, if the file system supports that."""
    if sys.platform == "win32":  # Windows cannot flush a folder
        return
    try:
        _flush(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NOTHING_TO_FLUSH:
            raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
