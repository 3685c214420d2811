"""The end of a file of lines that another process writes: no line twice, and no half line."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["News", "Tail"]

# An intervention on 70B parameters takes some 150 kB; more is no line of ours.
MAX_LINE_BYTES = 16 * 2**20
# Of a file that is there already, and of what one look adds. Twice the longest line: wherever the
# reading begins, the newest line is whole.
MAX_LOOK_BYTES = 2 * MAX_LINE_BYTES
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
    has_more: bool = False
    """There is more than one look takes: the next one goes on from here."""


class Tail:
    """Follows one file, which may not exist yet, may vanish, and may be replaced by another.

    What follows the last line's end waits until it is a line: a process may be writing it, and
    what a crash has cut never becomes one.

    Args:
        path: The file.
        max_bytes: How much of a file that is there already is read, from its end; and the most
            that one look reads, but for a chunk of 1 MiB.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOOK_BYTES) -> None:
        self.path = path
        self.modified_seconds: float | None = None
        """When it was last written, as `time.time`; None while it is not there."""
        self._max_bytes = max_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self._skips = self._is_counted = False

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
        # One byte more: where it is a line's end, the line behind it is whole.
        self._offset = max(0, found.st_size - self._max_bytes - 1)
        self._skips = self._offset > 0
        self._is_counted = False
        return is_known

    def _read(self, restarted: bool) -> News:
        lines: list[bytes] = []
        num_lost = 0
        end = self._offset + self._max_bytes
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while self._offset < end and (chunk := file.read(_CHUNK_BYTES)):
                self._offset += len(chunk)
                *whole, self._rest = (self._rest + chunk).split(b"\n")
                if whole and self._skips:
                    num_lost += not self._is_counted and len(whole[0]) > MAX_LINE_BYTES
                    whole, self._skips, self._is_counted = whole[1:], False, False
                lines += whole
                if len(self._rest) > MAX_LINE_BYTES:
                    num_lost += not self._is_counted
                    self._rest, self._skips, self._is_counted = b"", True, True
            has_more = bool(file.peek(1))
        kept = tuple(line for line in lines if line.strip() and len(line) <= MAX_LINE_BYTES)
        num_lost += sum(len(line) > MAX_LINE_BYTES for line in lines)
        return News(kept, has_restarted=restarted, num_lost=num_lost, has_more=has_more)
