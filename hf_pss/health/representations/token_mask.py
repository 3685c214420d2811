"""Which tokens of a batch count, and for whose hidden states a mask says so."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["TokenMask"]


class TokenMask:
    """A mask's positions on the host: one device-to-host read when it is made, none afterwards.

    Args:
        mask: (batch, tokens), nonzero where a token counts.
    """

    def __init__(self, mask: Tensor) -> None:
        self.positions = mask.reshape(-1).cpu().nonzero().flatten()
        """Of the tokens that count, in a batch whose rows follow each other; int64."""
        self.shape = tuple(mask.shape)

    @property
    def hides_some(self) -> bool:
        """Whether there is a token that does not count."""
        return len(self.positions) < math.prod(self.shape)

    def fits(self, hidden: Tensor) -> bool:
        """Tell whether hidden states (batch, tokens, d), or (batch · tokens, d), are of its shape.

        Those of a picture, of another sequence, or behind virtual tokens are not, even where they
        are as many.
        """
        return hidden.shape[:-1] in (self.shape, (math.prod(self.shape),))
