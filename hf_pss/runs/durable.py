"""Files that survive a power cut, and folders that appear in one piece."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

__all__ = ["STAGING", "move_into_place", "sync_folder", "sync_tree"]

# Beside the checkpoints, so that a rename is enough. Neither the Trainer's rotation nor its resume
# looks at such a name, and uploads to the Hub leave out what begins with an underscore.
STAGING = "_pss_saving"
_REPLACED = "replaced"
# Windows flushes writable files alone; elsewhere a file may be for reading alone, and is flushed.
_TO_FLUSH = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
# What file systems answer that keep no folders to be flushed: some of networks, some of FUSE.
_NOTHING_TO_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below, and the folder itself, to the disk.

    Raises:
        OSError: The disk refuses; nothing may be believed of the files then.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(root, name), _TO_FLUSH)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the file system can.

    Raises:
        OSError: The disk refuses.
    """
    if sys.platform == "win32":  # which has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOTHING_TO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def move_into_place(staged: Path, target: Path) -> None:
    """Give a complete folder its name; what had that name is removed after that, not before.

    Args:
        staged: ``<run>/_pss_saving/checkpoint-N``, on the disk already.
        target: ``<run>/checkpoint-N``.

    Raises:
        OSError: The disk refuses; what had the name has it again.
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
    sync_folder(target.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)
