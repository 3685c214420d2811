"""Where a tensor sits in its network, and what kind of matrix it is: told from its name alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Place", "place_of"]

# The block is the first number of the path, as in a report's maps: transformer.h.3.attn.c_attn.
_BLOCK = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<block>\d{1,6})\.(?P<rest>.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Place:
    """A kind of matrix in a block."""

    stack: str
    """What numbers the blocks: ``model.layers``; empty where nothing does."""
    block: int | None
    """None outside the repeated blocks: embeddings, heads."""
    kind: str
    """What the matrices of all blocks have in common: ``mlp.experts.*.down_proj``."""


def place_of(name: str) -> Place:
    """Tell the place of a tensor.

    >>> place_of("model.layers.3.mlp.experts.17.down_proj.weight")
    Place(stack='model.layers', block=3, kind='mlp.experts.*.down_proj')
    >>> place_of("lm_head.weight")
    Place(stack='', block=None, kind='lm_head')
    """
    bare = name.removesuffix(".weight")
    match = _BLOCK.match(bare)
    if match is None:
        return Place("", None, bare)
    kind = _NUMBER.sub("*", match["rest"])
    return Place(match["stack"] or "", int(match["block"]), kind)
