"""The largest attention logits of a training step, for the health monitor; it ends no run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_pss.health.representations.meter import StopAttention, WatchAttention
from hf_pss.integration.attention_maxima import AttentionMaxima

__all__ = ["attention_watch"]

logger = logging.getLogger(__name__)


def attention_watch(model: nn.Module) -> WatchAttention:
    """Return what starts to measure.

    Nothing is done before it is called, which only ``full`` does. Logits are computed once more
    while it measures. What `AttentionMaxima` cannot measure, such as a model's attention that is
    not known or a mask that it cannot read, is one warning, and there is no such number any more.

    Args:
        model: A transformers model, wrapped or not; not compiled, for each measurement would break
            the graph.
    """
    has_failed = False

    def fail(error: Exception) -> tuple[Mapping[str, Tensor], float]:
        nonlocal has_failed
        has_failed = True
        logger.warning(
            "The health metric attention_logit_max is not measured in this run: %s", error
        )
        return {}, 0.0

    def start() -> StopAttention:
        if has_failed:
            return lambda: ({}, 0.0)
        try:
            maxima = _QuietMaxima(model)
            maxima.start()
        except Exception as error:
            nothing = fail(error)
            return lambda: nothing

        def stop() -> tuple[Mapping[str, Tensor], float]:
            maxima.stop()
            return (maxima.read(), maxima.seconds) if maxima.error is None else fail(maxima.error)

        return stop

    return start


class _QuietMaxima(AttentionMaxima):
    """Keeps what `see` raises, which would go through the model's forward."""

    _ADVICE = ""
    error: Exception | None = None
    seconds = 0.0

    def see(self, *args: Any, **named: Any) -> None:
        if self.error is not None:
            return
        started = time.perf_counter()
        try:
            super().see(*args, **named)
        except Exception as error:
            self.error = error
        self.seconds += time.perf_counter() - started
