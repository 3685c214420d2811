"""Try an edit of the weights on a micro-batch before it is kept [ours]."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_pss.models.distributed import Backend, reshard
from hf_pss.models.selection import named_parameters_canonical

logger = logging.getLogger(__name__)

EvaluateLoss = Callable[[], float | Tensor | None]
"""Returns the loss of one micro-batch with the current weights, or None.

The function changes nothing, not even the random state. It returns the same
loss for the same weights."""


@dataclass(slots=True)
class Trial:
    """Compares the loss before and after an edit, and undoes a harmful edit.

    A trial copies what this rank stores of each edited parameter. So an edit that is undone leaves
    no trace, not even of rounding. The copies need as much memory as the gradients of the edited
    matrices, which a Trainer has already freed at this point of a step.

    All ranks must make the same calls. The losses are means over ranks.
    """

    evaluate: EvaluateLoss
    model: nn.Module
    backend: Backend
    margin_ratio: float
    """The share of the loss's absolute value by which an edit may raise the loss."""
    keeps_untried: bool
    """Whether to keep an edit that cannot be tried because the loss is None."""
    loss_before: float | None = None
    """None until it is measured, and None if `evaluate` returns None."""
    loss_after: float | None = None
    _has_begun: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def before_write(self, names: Collection[str]) -> None:
        """Copy these parameters. The first call also measures the loss."""
        if not self._has_begun:
            self._has_begun = True
            self.loss_before = self._loss()
        if self.loss_before is None and self.keeps_untried:
            return
        parameters = named_parameters_canonical(self.model)
        for name in sorted(set(names) - self._kept.keys()):
            self._kept[name] = self.backend.keep(parameters[name])

    def is_kept(self) -> bool:
        """Measure the loss again. Return whether the edit stays, and undo it if not."""
        if not self._kept:
            return True
        if self.loss_before is not None:
            self.loss_after = self._loss()
        if self._is_no_worse():
            return True
        parameters = named_parameters_canonical(self.model)
        for name, kept in self._kept.items():
            self.backend.put_back_(parameters[name], kept)
        return False

    @property
    def why_not(self) -> str:
        """The reason why an edit was undone."""
        if self.loss_before is None or self.loss_after is None:
            return "there was no loss to try it on"
        return "it raised the loss"

    def _is_no_worse(self) -> bool:
        before, after = self.loss_before, self.loss_after
        if before is None or after is None:
            return self.keeps_untried
        if not math.isfinite(before):  # There is nothing to compare with.
            return True
        return after <= before + self.margin_ratio * abs(before)  # False for NaN.

    @torch.no_grad()
    def _loss(self) -> float | None:
        """Return the mean loss over ranks, or None if one rank has None.

        If a user's code raises an error, a run with several ranks ends, because the other ranks
        wait inside the forward pass. A single process continues without the trial.
        """
        loss: float | Tensor | None = None
        try:
            loss = self.evaluate()
        except Exception as error:
            if self.backend.is_shared:
                raise
            logger.warning("PSS could not compute a loss to try an intervention on: %r", error)
        finally:
            # The next forward pass would reuse gathered weights, which an edit does not reach.
            reshard(self.model)
        device = next(self.model.parameters()).device
        value = torch.as_tensor(0.0 if loss is None else loss, dtype=torch.float32, device=device)
        numbers = torch.stack([value.detach().mean(), value.new_tensor(float(loss is None))])
        mean, num_missing = self.backend.agree(numbers)
        return None if num_missing else mean
