"""Write files and folders whole or not at all, so that they survive a crash or a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hf_pss.errors import ConfigurationError
from hf_pss.records.strict_json import visible

__all__ = ["move_into_place", "new_folder", "replacing", "sync_tree", "write_whole"]

_REPLACED = "replaced"
# Windows flushes only files that are open for writing. Elsewhere a file may be read-only.
_TO_FLUSH = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
# Errors of file systems that cannot flush a folder: some network file systems, some of FUSE.
_NOTHING_TO_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all, and flush it to the disk.

    Raises:
        OSError: The file cannot be written. A file that had the name is unchanged.
    """
    with replacing(path) as stream:
        stream.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of `path` when the block ends without an error.

    Raises:
        OSError: The file cannot be written. A file that had the name is unchanged.
    """
    scratch = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.partial")
    try:
        with scratch.open("xb") as stream:  # "x" writes neither over a file nor through a link
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
        target: A path that does not exist, in a folder that does.
        like: A folder whose permissions `target` gets.

    Raises:
        ConfigurationError: Another program has made `target` in the meantime.
        OSError: The disk refuses. Nothing of the folder is left.
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
        OSError: The disk refuses. The files may be incomplete then.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(root, name), _TO_FLUSH)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(root))


def move_into_place(staged: Path, target: Path) -> None:
    """Give a complete folder its name. An older folder of that name is removed afterwards.

    Args:
        staged: ``<run>/_pss_saving/checkpoint-N``, flushed to the disk.
        target: ``<run>/checkpoint-N``.

    Raises:
        OSError: The disk refuses. The older folder has its name again.
    """
    replaced = staged.parent / _REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)  # a crash here leaves the complete one in the staging folder
    try:
        staged.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, where the file system can do that."""
    if sys.platform == "win32":  # has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOTHING_TO_FLUSH:
            raise
    finally:
        os.close(descriptor)
