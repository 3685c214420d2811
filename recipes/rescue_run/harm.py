"""Let something go wrong in some steps of PSSTrainer, for compare.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_pss import PSSTrainer


@contextmanager
def harmed(
    kind: str | None = None, *, first: int = 0, last: int = 0, factor: float = 1.0
) -> Iterator[None]:
    """Harm the steps from `first` to `last` of every PSSTrainer that trains in this context.

    Args:
        kind: The harm. random_batch trains on random tokens, nan_gradient puts a NaN into each
            gradient, and high_learning_rate multiplies the rate. None harms nothing.
        first: The first harmed step; steps are counted from 1.
        last: The last harmed step; `first` if it is smaller.
        factor: Factor on the learning rate.
    """
    training_step = PSSTrainer.training_step

    def harmed_step(self: PSSTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if kind is None or not first <= self.state.global_step + 1 <= max(first, last):
            return training_step(self, model, inputs, *args, **kwargs)
        if kind == "random_batch":
            ids = inputs["input_ids"]
            drawn = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
            noise = torch.randint(model.config.vocab_size, ids.shape, generator=drawn)
            inputs = {**inputs, "input_ids": noise, "labels": noise}
        loss = training_step(self, model, inputs, *args, **kwargs)
        if kind == "nan_gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
        if kind == "high_learning_rate":
            for group in self.optimizer.param_groups:
                group["lr"] *= factor  # the scheduler sets the rate of the next step
        return loss

    PSSTrainer.training_step = harmed_step
    try:
        yield
    finally:
        PSSTrainer.training_step = training_step
