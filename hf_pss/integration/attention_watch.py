"""The largest attention logits of a training step, for the health monitor; it ends no run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_pss.errors import PSSError
from hf_pss.integration.attention_maxima import AttentionMaxima

__all__ = ["attention_watch"]

logger = logging.getLogger(__name__)


def attention_watch(model: nn.Module) -> Callable[[], Callable[[], Mapping[str, Tensor]]] | None:
    """Return what starts to measure, which returns what stops and tells; None where nothing can.

    Logits are computed once more while it measures. What `AttentionMaxima` refuses, such as a mask
    that it cannot read, is one warning, and there is no such number any more.

    Args:
        model: A transformers model, wrapped or not; not compiled, for each measurement would break
            the graph.
    """
    try:
        AttentionMaxima(model)
    except PSSError as error:
        logger.info("Attention logits are no part of the health metrics here: %s", error)
        return None
    has_failed = False

    def start() -> Callable[[], Mapping[str, Tensor]]:
        nonlocal has_failed
        if has_failed:
            return dict
        maxima = _QuietMaxima(model)
        maxima.start()

        def stop() -> Mapping[str, Tensor]:
            nonlocal has_failed
            maxima.stop()
            if maxima.error is None:
                return maxima.read()
            has_failed = True
            logger.warning("Attention logits are no longer measured: %s", maxima.error)
            return {}

        return stop

    return start


class _QuietMaxima(AttentionMaxima):
    """Keeps what `see` raises, which would go through the model's forward."""

    error: Exception | None = None

    def see(self, *args: Any, **named: Any) -> None:
        if self.error is not None:
            return
        try:
            super().see(*args, **named)
        except Exception as error:
            self.error = error
