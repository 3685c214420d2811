"""Names that a file chose, made fit to be shown: what a terminal would obey becomes visible."""

from __future__ import annotations

__all__ = ["visible"]

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
