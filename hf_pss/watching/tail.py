"""The end of a file of lines that another process writes: no line twice, and no half line."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["News", "Tail"]

# An intervention on 70B parameters takes some 150 kB; more is no line of ours.
MAX_LINE_BYTES = 16 * 2**20
# Of a file that is there already: hundreds of interventions, or readings of a small model.
FIRST_BYTES = 8 * 2**20
_CHUNK_BYTES = 2**20
_GONE = (-1, -1)


@dataclass(frozen=True, slots=True)
class News:
    """What a file has gained."""

    lines: tuple[bytes, ...]
    """Whole ones, without their ends."""
    has_restarted: bool
    """The file was replaced or cut since the last look: the lines begin with the new one's."""
    num_lost: int
    """Lines that were too long to be read."""


class Tail:
    """Follows one file, which may not exist yet, may vanish, and may be replaced by another.

    What follows the last line's end waits until it is a line: a process may be writing it, and
    what a crash has cut never becomes one.

    Args:
        path: The file.
        first_bytes: How much of a file that is there already is read, from its end.
    """

    def __init__(self, path: Path, *, first_bytes: int = FIRST_BYTES) -> None:
        self.path = path
        self.modified_seconds: float | None = None
        """When it was last written, as `time.time`; None while it is not there."""
        self._first_bytes = first_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self._skips = False

    def poll(self) -> News:
        """Return what has come since the last look."""
        try:
            # Not a pipe's end: opening one would wait for its writer.
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError
            restarted = self._follow(found)
            return self._read(restarted)
        except OSError:
            self.modified_seconds = None
            if self._identity is not None:
                self._identity = _GONE  # what comes may be given the same number
            return News((), has_restarted=False, num_lost=0)

    def _follow(self, found: os.stat_result) -> bool:
        self.modified_seconds = found.st_mtime
        identity = (found.st_dev, found.st_ino)
        is_known = self._identity is not None
        if identity == self._identity and found.st_size >= self._offset:
            return False
        self._identity, self._rest = identity, b""
        self._offset = max(0, found.st_size - self._first_bytes)
        self._skips = self._offset > 0  # most likely in the middle of a line
        return is_known

    def _read(self, restarted: bool) -> News:
        lines: list[bytes] = []
        num_lost = 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(_CHUNK_BYTES):
                self._offset += len(chunk)
                *whole, self._rest = (self._rest + chunk).split(b"\n")
                if whole and self._skips:
                    whole, self._skips = whole[1:], False
                lines += whole
                if len(self._rest) > MAX_LINE_BYTES:
                    num_lost += not self._skips
                    self._rest, self._skips = b"", True
        kept = tuple(line for line in lines if line.strip() and len(line) <= MAX_LINE_BYTES)
        return News(kept, has_restarted=restarted, num_lost=num_lost)
