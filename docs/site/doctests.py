"""A griffe extension that turns the doctests in docstrings into code blocks of Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A prompt, and every line up to the next blank one: the code and its output.
DOCTEST = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences every doctest, because Markdown would read ``>>>`` as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(
                lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", obj.docstring.value
            )
