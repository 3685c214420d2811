"""Read JSON from files that may come from anyone: limited in size, strict, without duplicate keys.

This module also makes text from such files safe to show in a terminal.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from hf_pss.errors import StateError

# The number of characters of a name that are shown.
_LONGEST = 300


def read_object(path: Path, *, max_bytes: int, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Reading takes up to 25 bytes of memory for each byte of the file. We measured this for
    a list of empty lists.

    Args:
        path: The file.
        max_bytes: The largest size. A larger file is not read. The limits of the files in a run's
            folder are the constants ``MAX_*_BYTES`` of `hf_pss.runs.folder`.
        allow_nonfinite: Whether to accept the words NaN and Infinity, which the Trainer writes.

    Raises:
        StateError: The file is not a regular file, is too large, is not strict JSON, or
            does not hold an object.
        OSError: The file is missing or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise StateError(f"{visible(path)} is not a regular file: it is not opened.")
    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise StateError(
            f"{visible(path)} is larger than {max_bytes} bytes, more than any such file holds: "
            "it is damaged, or its name is wrong."
        )
    return parse_object(raw, what=visible(path), allow_nonfinite=allow_nonfinite)


def parse_object(raw: bytes, *, what: str, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: The text in UTF-8.
        what: The subject of the error message.
        allow_nonfinite: Whether to accept NaN and Infinity as numbers.

    Raises:
        StateError: The text is not strict JSON, or is not an object. Duplicate keys, NaN, Infinity
            and too deep nesting are not strict JSON.
    """
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=float if allow_nonfinite else _no_constant,
        )
    except RecursionError as error:
        raise StateError(f"{what} is nested too deeply: it is damaged.") from error
    except ValueError as error:  # from json, from UTF-8, and for integers of thousands of digits
        raise StateError(f"{what} is not valid JSON: {visible(error)}.") from error
    if not isinstance(parsed, dict):
        raise StateError(f"{what} holds a {type(parsed).__name__}, not an object: it is damaged.")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Programs differ in which of two equal keys they use, so such a file is rejected.
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON can hold, or None for NaN, inf and None.

    >>> finite_or_none(1.5), finite_or_none(float("nan"))
    (1.5, None)
    """
    return value if value is not None and math.isfinite(value) else None


def visible(name: object) -> str:
    r"""Replace every character that does not print by its escape, and cut a very long text.

    A tensor's name may hold escape sequences, line breaks, and marks that change
    the direction of writing.

    >>> visible("h.0\x1b[2J.weight")
    'h.0\\x1b[2J.weight'
    """
    text = str(name)
    return printable(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def printable(text: str) -> str:
    r"""Replace every character that does not print by its escape.

    A lone surrogate, as in a file name that is not UTF-8, could not be written otherwise.

    >>> printable("run-\udcff")
    'run-\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


def reason_of(error: Exception) -> str:
    """Return an error's message, safe to show. For a system error the file's name is left out."""
    return visible(error.strerror if isinstance(error, OSError) else error)
