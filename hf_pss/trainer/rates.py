"""``pss_lr_scale``: a factor on every learning rate that a resume obeys, too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR

from hf_pss.errors import ConfigurationError

__all__ = ["ScaledRates", "set_base_rates_"]

logger = logging.getLogger(__name__)


class ScaledRates:
    """Mixin, left of a Trainer class: its schedule's rates are those given, times ``pss_lr_scale``.

    A checkpoint brings the base rates of the run that wrote it, so that after a resume
    ``learning_rate`` has no effect. With a ``pss_lr_scale`` they are this run's instead: resumed
    once more with the same factor, it is not applied twice. The optimizer's ``initial_lr`` stays
    what was given, from which a second train() builds its schedule.
    """

    _given_rates: list[float] | None = None
    """Of the schedule as it was built, one for each parameter group."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            ConfigurationError: ``pss_lr_scale`` was given, and the schedule cannot be scaled.
        """
        trainer: Any = self
        if _scale_of(trainer) is not None and _has_own_scheduler(trainer):
            raise ConfigurationError(
                "pss_lr_scale scales the Trainer's schedule, and this DeepSpeed configuration has "
                "a scheduler of its own: change the rates there, or leave pss_lr_scale out."
            )
        # One list, for DeepSpeed lets a shallow copy of the trainer build the schedule.
        self._given_rates = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build the schedule, and scale it."""
        scheduler = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        scale = _scale_of(self)
        if scale is not None:
            given = self._given_rates = [] if self._given_rates is None else self._given_rates
            given[:] = map(float, _schedule_in(scheduler).base_lrs)
            set_base_rates_(scheduler, [rate * scale for rate in given])
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        trainer: Any = self
        scale, given = _scale_of(self), self._given_rates
        if checkpoint is None or scale is None or given is None:
            return
        wanted = [rate * scale for rate in given]
        loaded = set_base_rates_(trainer.lr_scheduler, wanted)
        for group, rate in zip(trainer.optimizer.param_groups, given, strict=True):
            group["initial_lr"] = rate
        if loaded != wanted and trainer.is_world_process_zero():
            logger.warning(
                "pss_lr_scale=%g: the schedule goes on from a base rate of %s instead of %s, which "
                "%s has.",
                scale,
                *(", ".join(f"{rate:.3g}" for rate in dict.fromkeys(r)) for r in (wanted, loaded)),
                checkpoint,
            )


def set_base_rates_(scheduler: Any, rates: Sequence[float]) -> list[float]:
    """Let a schedule go on from other base rates, at the same place of its course.

    Args:
        scheduler: A `LambdaLR`, as transformers builds them, or Accelerate's wrapper around one.
        rates: One for each parameter group of its optimizer.

    Returns:
        Those it had.

    Raises:
        ConfigurationError: It is of another kind, or has another number of them.
    """
    schedule = _schedule_in(scheduler)
    before = [float(rate) for rate in schedule.base_lrs]
    if len(before) != len(rates):
        raise ConfigurationError(
            f"The schedule has {len(before)} base rates, and the optimizer was built with "
            f"{len(rates)}: leave pss_lr_scale out."
        )
    # Where nothing changes, the factor is exactly 1.
    factors = [new / old if old else 1.0 for old, new in zip(before, rates, strict=True)]
    now = [rate * factor for rate, factor in zip(schedule.get_last_lr(), factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, now, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule.base_lrs, schedule._last_lr = list(rates), now
    return before


def _schedule_in(scheduler: Any) -> LambdaLR:
    while isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    # Others keep rates of their own beside the base rates, or derive them from the optimizer.
    if type(scheduler) is not LambdaLR:
        raise ConfigurationError(
            f"pss_lr_scale cannot scale {type(scheduler).__name__}, whose rates are no multiples "
            "of base rates: leave it out, or choose another lr_scheduler_type."
        )
    return scheduler


def _scale_of(trainer: Any) -> float | None:
    scale: float | None = getattr(trainer.args, "pss_lr_scale", None)
    return scale


def _has_own_scheduler(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "scheduler" in plugin.deepspeed_config
