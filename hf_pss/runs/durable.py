"""Write files and folders completely or not at all, even if the process or the power fails."""

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
# Windows flushes only files that are open for writing. On other systems, opening read-only is
# enough, and it also works for read-only files.
_TO_FLUSH = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
# Some network and FUSE file systems cannot flush a folder and return one of these errors.
_NOTHING_TO_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def write_whole(path: Path, text: str) -> None:
    """Write a complete UTF-8 text file or nothing, and flush it to the disk.

    Raises:
        OSError: The file cannot be written. An existing file of the same name is unchanged.
    """
    with replacing(path) as stream:
        stream.write(text.encode())


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
            descriptor = os.open(Path(root, name), _TO_FLUSH)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
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


def _sync_folder(folder: Path) -> None:
    """Flush the list of names in a folder, if the file system supports that."""
    if sys.platform == "win32":  # Windows cannot flush a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOTHING_TO_FLUSH:
            raise
    finally:
        os.close(descriptor)
