"""``pss_lr_scale``: a factor on every learning rate that a resume obeys, too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from hf_pss.errors import ConfigurationError

__all__ = ["ScaledRates", "set_base_rates_"]

logger = logging.getLogger(__name__)


class ScaledRates:
    """Mixin, left of a Trainer class: its schedule's rates are those given, times ``pss_lr_scale``.

    A checkpoint brings the base rates of the run that wrote it, so that after a resume
    ``learning_rate`` has no effect. With a ``pss_lr_scale`` other than 1 they are this run's:
    resumed once more with the same factor, it is not applied twice.
    """

    _base_rates: list[float] | None = None
    """Of the schedule as it was first built, scaled; one for each parameter group."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            ConfigurationError: ``pss_lr_scale`` was given, and the schedule has no base rates.
        """
        trainer: Any = self
        if _scale_of(trainer) != 1.0 and _has_own_scheduler(trainer):
            raise ConfigurationError(
                "pss_lr_scale scales the Trainer's schedule, and this DeepSpeed configuration has "
                "a scheduler of its own: change the rates there, or leave pss_lr_scale out."
            )
        self._known_rates()  # before a shallow copy of the trainer builds the schedule (DeepSpeed)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build the schedule, and scale it."""
        scheduler = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        scale, rates = _scale_of(self), self._known_rates()
        if scale != 1.0:
            if len(rates) != len(_base_rates(scheduler)):
                rates[:] = [rate * scale for rate in _base_rates(scheduler)]
            set_base_rates_(scheduler, rates)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        scale, rates = _scale_of(self), self._known_rates()
        if checkpoint is None or scale == 1.0:
            return
        trainer: Any = self
        loaded = set_base_rates_(trainer.lr_scheduler, rates)
        if loaded != rates and trainer.is_world_process_zero():
            logger.info(
                "pss_lr_scale=%g: the schedule goes on from a base rate of %s instead of %s, which "
                "%s has.",
                scale,
                *(", ".join(f"{rate:.3g}" for rate in dict.fromkeys(r)) for r in (rates, loaded)),
                checkpoint,
            )

    def _known_rates(self) -> list[float]:
        if self._base_rates is None:
            self._base_rates = []
        return self._base_rates


def set_base_rates_(scheduler: Any, rates: Sequence[float]) -> list[float]:
    """Let a schedule go on from other base rates, at the same place of its course.

    Args:
        scheduler: A schedule with ``base_lrs``, or Accelerate's wrapper around one.
        rates: One for each parameter group of its optimizer.

    Returns:
        Those it had.

    Raises:
        ConfigurationError: It has none, or another number of them.
    """
    scheduler = _unwrapped(scheduler)
    before = _base_rates(scheduler)
    if len(before) != len(rates):
        raise ConfigurationError(
            f"The schedule has {len(before)} base rates, and the optimizer was built with "
            f"{len(rates)}: leave pss_lr_scale out."
        )
    # Where nothing changes, the factor is exactly 1.
    factors = [new / old if old else 1.0 for old, new in zip(before, rates, strict=True)]
    now = [rate * factor for rate, factor in zip(scheduler.get_last_lr(), factors, strict=True)]
    groups = scheduler.optimizer.param_groups
    for group, base, rate in zip(groups, rates, now, strict=True):
        group["initial_lr"] = base
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler.base_lrs, scheduler._last_lr = list(rates), now
    return before


def _base_rates(scheduler: Any) -> list[float]:
    rates = getattr(_unwrapped(scheduler), "base_lrs", None)
    if rates is None:
        raise ConfigurationError(
            f"{type(scheduler).__name__} has no base rates that could be scaled: leave "
            "pss_lr_scale out, or choose another lr_scheduler_type."
        )
    return [float(rate) for rate in rates]


def _unwrapped(scheduler: Any) -> Any:
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def _scale_of(trainer: Any) -> float:
    return float(getattr(trainer.args, "pss_lr_scale", 1.0))


def _has_own_scheduler(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "scheduler" in plugin.deepspeed_config
