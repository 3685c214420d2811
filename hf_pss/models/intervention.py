"""Carry out one intervention: smooth, try the result, undo it or edit the optimizer's state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import GLOBAL, Judgement
from hf_pss.detection.policy import Action
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Anchored, SmoothingFunction, StableRankCap
from hf_pss.models.adapters import frozen_collapses, smooth_adapters_
from hf_pss.models.anchors import Anchors
from hf_pss.models.measurements import Measurements
from hf_pss.models.optimizer_state import (
    FIRST_MOMENTS,
    edit_first_moments_,
    edit_schedule_free_,
    is_schedule_free,
)
from hf_pss.models.smoother import Edit, PhiFor, smooth_matrices_
from hf_pss.models.trial import EvaluateLoss, Trial
from hf_pss.records.events import Event, EventKind, Intervention, MatrixChange

logger = logging.getLogger(__name__)


class ModelSmoother:
    """Smooths one model according to its options, and changes nothing else.

    Args:
        measurements: The measurements of the model to smooth.
        config: The options.
        optimizer: The optimizer, whose state is edited in place; see ``moments``.
        evaluate_loss: Computes the loss with which an intervention is tried; see ``trial``.
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
        trial = self._trial(event, is_floor=is_floor, is_anchored=anchors is not None)
        is_repair = event.kind is EventKind.RESUME and self._config.reacts_to_spikes
        edits: list[Edit] = []
        parameters = self._measurements.parameters()
        changes = self._smooth_weights_(
            parameters,
            floor_cap=_floor_cap(floors) if is_floor else None,
            phi_for=self._smoothing_function(anchors),
            # Adapters have no floor, but a repair that a person asked for smooths them as well.
            includes_adapters=is_repair or not is_floor,
            names=self._names_to_smooth(judgement, is_floor=is_floor),
            before_write=None if trial is None else trial.before_write,
            and_then=edits.extend if self._has_state_to_edit() else None,
        )
        if trial is not None and not trial.is_kept():
            event = replace(event, decision=Action.UNDO, reason=trial.why_not)
        elif self._optimizer is not None and edits:
            self._edit_optimizer_(self._optimizer, edits, parameters)
        return Intervention(
            event=event,
            smoothing="stable_rank_cap" if is_floor else self._config.smoothing,
            seconds=time.perf_counter() - started,
            loss_before=None if trial is None else trial.loss_before,
            loss_after=None if trial is None else trial.loss_after,
            matrices=changes,
        )

    def _smooth_weights_(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        floor_cap: PhiFor | None,
        phi_for: PhiFor,
        includes_adapters: bool,
        and_then: Callable[[Sequence[Edit]], None] | None,
        **options: Any,
    ) -> tuple[MatrixChange, ...]:
        """Smooth complete matrices by the floor's cap or by φ, and LoRA products by φ."""
        options |= {
            "max_rank": self._config.max_rank,
            "keep_frobenius": self._config.keep_frobenius,
        }
        selection, backend = self._measurements.selection, self._measurements.backend
        matrices, adapters = selection.matrices, selection.adapters
        changes = smooth_matrices_(
            matrices, parameters, backend, floor_cap or phi_for, and_then=and_then, **options
        )
        if adapters and includes_adapters:
            self._check_base(parameters)
            changes += smooth_adapters_(adapters, parameters, backend, phi_for, **options)
        return changes

    def _smoothing_function(self, anchors: Anchors | None) -> PhiFor:
        def phi_for(names: Sequence[str]) -> SmoothingFunction:
            phi = SMOOTHING_FUNCTIONS[self._config.smoothing]()
            return phi if anchors is None else Anchored(phi, anchors.levels(names))

        return phi_for

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


def _floor_cap(floors: Mapping[str, float]) -> PhiFor:
    return lambda names: StableRankCap(torch.tensor([floors[name] for name in names]))
