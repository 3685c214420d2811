"""Carry out one intervention: smooth, try the result, undo it or edit the optimizer's state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import GLOBAL, Judgement
from hf_pss.detection.policy import Action
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Anchored, SmoothingFunction, StableRankCap
from hf_pss.models.adapters import frozen_collapses, smooth_adapters_
from hf_pss.models.anchors import Anchors
from hf_pss.models.batching import matrix_names
from hf_pss.models.distributed import Backend, reshard
from hf_pss.models.measurements import Measurements
from hf_pss.models.selection import named_parameters_canonical
from hf_pss.models.smoother import (
    FIRST_MOMENTS,
    Edit,
    edit_first_moments_,
    edit_schedule_free_,
    is_schedule_free,
    smooth_matrices_,
)
from hf_pss.records.events import Event, EventKind, Intervention

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


class ModelSmoother:
    """Smooths one model according to its options, and changes nothing else.

    Args:
        measurements: The measurements of the model to smooth.
        config: The options.
        optimizer: The optimizer, whose state is edited in place; see ``moments``.
        evaluate_loss: Computes the loss with which an intervention is tried; see `Trial`.
    """

    def __init__(
        self,
        measurements: Measurements,
        config: PSSConfig,
        optimizer: Optimizer | None,
        evaluate_loss: EvaluateLoss | None,
    ) -> None:
        self._measurements, self._config = measurements, config
        self._optimizer, self._evaluate_loss = optimizer, evaluate_loss
        self._has_warned_of_moments = self._has_checked_base = False

    def smooth_(
        self,
        event: Event,
        judgement: Judgement,
        *,
        is_floor: bool,
        floors: Mapping[str, float],
        anchors: Anchors | None,
    ) -> Intervention:
        """Smooth the model in place, and undo this if a trial shows that it raises the loss.

        Args:
            event: The event that smoothing responds to.
            judgement: The judgement of the event. It names the matrices that fired.
            is_floor: Whether to raise each matrix to its floor. If false, ``smoothing`` is applied.
            floors: The stable-rank floor of each matrix.
            anchors: The record of healthy values. None means no limits.
        """
        started = time.perf_counter()
        config, selection = self._config, self._measurements.selection
        parameters, backend = self._measurements.parameters(), self._measurements.backend
        trial = self._trial(event, is_floor=is_floor, is_anchored=anchors is not None)
        options: dict[str, Any] = {
            "names": self._names_to_smooth(judgement, is_floor=is_floor),
            "max_rank": config.max_rank,
            "keep_frobenius": config.keep_frobenius,
            "before_write": None if trial is None else trial.before_write,
        }

        def floor_cap(names: Sequence[str]) -> SmoothingFunction:
            return StableRankCap(torch.tensor([floors[name] for name in names]))

        def phi_for(names: Sequence[str]) -> SmoothingFunction:
            phi = SMOOTHING_FUNCTIONS[config.smoothing]()
            return phi if anchors is None else Anchored(phi, anchors.levels(names))

        edits: list[Edit] = []
        changes = smooth_matrices_(
            selection.matrices,
            parameters,
            backend,
            floor_cap if is_floor else phi_for,
            and_then=edits.extend if self._has_state_to_edit() else None,
            **options,
        )
        # Adapters have no floor, but a repair that a person asked for smooths them as well.
        is_repair = event.kind is EventKind.RESUME and config.reacts_to_spikes
        if selection.adapters and (is_repair or not is_floor):
            self._check_base(parameters)
            changes += smooth_adapters_(selection.adapters, parameters, backend, phi_for, **options)
        if trial is not None and not trial.is_kept():
            event = replace(event, decision=Action.UNDO, reason=trial.why_not)
        elif self._optimizer is not None and edits:
            self._edit_optimizer_(self._optimizer, edits, parameters)
        return Intervention(
            event=event,
            smoothing="stable_rank_cap" if is_floor else config.smoothing,
            seconds=time.perf_counter() - started,
            loss_before=None if trial is None else trial.loss_before,
            loss_after=None if trial is None else trial.loss_after,
            num_selected=len(matrix_names(selection.matrices)) + len(selection.adapters),
            matrices=changes,
        )

    def _trial(self, event: Event, *, is_floor: bool, is_anchored: bool) -> Trial | None:
        """Return a trial for one intervention, or None if no trial is wanted or possible."""
        is_wanted = self._config.trial == "all" or (self._config.trial == "spikes" and not is_floor)
        if not is_wanted or self._evaluate_loss is None:
            return None
        return Trial(
            self._evaluate_loss,
            self._measurements.model,
            self._measurements.backend,
            self._config.trial_margin_ratio,
            # An anchored edit is safe by construction, and the user has asked for a repair.
            keeps_untried=is_anchored or event.kind is EventKind.RESUME,
        )

    def _names_to_smooth(self, judgement: Judgement, *, is_floor: bool) -> frozenset[str] | None:
        """Return the matrices that an intervention may change, or None for all."""
        if GLOBAL in judgement.fired:
            return None
        return frozenset(judgement.fired) if is_floor or self._config.scope == "fired" else None

    def _check_base(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Warn once if the frozen base of an adapter has collapsed."""
        if self._has_checked_base:
            return
        self._has_checked_base = True
        views, backend = self._measurements.selection.adapters, self._measurements.backend
        if collapsed := frozen_collapses(views, parameters, backend):
            worst = min(collapsed, key=collapsed.__getitem__)
            logger.warning(
                "%d of the frozen base weights have a stable rank below 2 (%s: %.3g). An adapter "
                "cannot remove a direction of its base: repair the base model itself.",
                len(collapsed),
                worst,
                collapsed[worst],
            )

    def _has_state_to_edit(self) -> bool:
        optimizer = self._optimizer
        is_averaging = optimizer is not None and is_schedule_free(optimizer)
        return self._config.moments != "keep" or is_averaging

    def _edit_optimizer_(
        self,
        optimizer: Optimizer,
        edits: Sequence[Edit],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        backend, rule = self._measurements.backend, self._config.moments
        edit_schedule_free_(optimizer, edits, parameters, backend)
        if rule == "keep":
            return
        num_edited = edit_first_moments_(rule, optimizer, edits, parameters, backend)
        if not num_edited and not self._has_warned_of_moments:
            self._has_warned_of_moments = True
            logger.warning(
                "moments=%r: %s has no first moment of the smoothed matrices (%s), so its state "
                "was not changed.",
                rule,
                type(optimizer).__name__,
                " or ".join(FIRST_MOMENTS),
            )
