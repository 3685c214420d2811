"""JSON from files that nobody vouches for: capped in size, no duplicate key, no NaN.

Parsed, it takes up to 25 bytes of memory a byte (measured, of a list of empty lists): the caps
bound the memory, too.

Names that a file chose, made fit to be shown: what a terminal would obey becomes visible.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from hf_pss.errors import StateError

__all__ = ["parse_object", "read_object", "visible"]


def read_object(path: Path, *, max_bytes: int, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        max_bytes: The largest size that is read at all.
        allow_nonfinite: Take the words NaN and Infinity, which the Trainer writes.

    Raises:
        StateError: It is no regular file, is larger, is not strict JSON, or holds something else
            than an object.
        OSError: It is missing, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise StateError(f"{visible(path)} is no regular file: it is not opened.")
    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise StateError(
            f"{visible(path)} is larger than {max_bytes} bytes, more than any such file holds: "
            "it is damaged, or is not what its name says."
        )
    return parse_object(raw, what=visible(path), allow_nonfinite=allow_nonfinite)


def parse_object(raw: bytes, *, what: str, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: UTF-8.
        what: What it is, for the message.
        allow_nonfinite: Take NaN and Infinity as numbers.

    Raises:
        StateError: Not strict JSON: a duplicate key, NaN or Infinity, nesting without end; or no
            object.
    """
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=float if allow_nonfinite else _no_constant,
        )
    except RecursionError as error:
        raise StateError(f"{what} is nested too deeply: it is damaged.") from error
    except ValueError as error:  # of json, of UTF-8, and of integers with thousands of digits
        raise StateError(f"{what} is not valid JSON: {visible(error)}.") from error
    if not isinstance(parsed, dict):
        raise StateError(f"{what} holds a {type(parsed).__name__}, not an object: it is damaged.")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two equal keys they believe, so a file with both is refused.
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


_LONGEST = 300


def visible(name: object) -> str:
    r"""Write every character that does not print as its escape, and cut what is far too long.

    Escape sequences, line breaks, and the marks that turn the direction of writing: a tensor's name
    may hold any of them.

    >>> visible("h.0\x1b[2J.weight")
    'h.0\\x1b[2J.weight'
    """
    text = str(name)
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in cut
    )
