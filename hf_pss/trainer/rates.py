"""Implement ``pss_lr_scale``, a factor on every learning rate that also works in a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR

from hf_pss.errors import ConfigurationError

__all__ = ["refuse_own_schedule", "scale_of", "schedule_in", "set_base_rates_"]


def set_base_rates_(scheduler: Any, rates: Sequence[float]) -> list[float]:
    """Change the base rates of a schedule, and keep its position.

    Args:
        scheduler: A `LambdaLR`, as transformers builds it, or Accelerate's wrapper around one.
        rates: The new base rates, one for each parameter group of the optimizer.

    Returns:
        The previous base rates.

    Raises:
        ConfigurationError: The schedule is not a `LambdaLR`, or it has a different number
            of base rates.
    """
    schedule = schedule_in(scheduler)
    before = [float(rate) for rate in schedule.base_lrs]
    if len(before) != len(rates):
        raise ConfigurationError(
            f"The schedule has {len(before)} base rates, and the optimizer was built with "
            f"{len(rates)}: leave pss_lr_scale out."
        )
    # The factor of an unchanged rate is exactly 1.
    factors = [new / old if old else 1.0 for old, new in zip(before, rates, strict=True)]
    now = [rate * factor for rate, factor in zip(schedule.get_last_lr(), factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, now, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule.base_lrs, schedule._last_lr = list(rates), now
    return before


def schedule_in(scheduler: Any) -> LambdaLR:
    """Return the schedule inside Accelerate's wrappers.

    Raises:
        ConfigurationError: The schedule is not a `LambdaLR`.
    """
    while isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    # Other schedules keep more rates than the base rates, or derive rates from the optimizer.
    if type(scheduler) is not LambdaLR:
        raise ConfigurationError(
            f"pss_lr_scale cannot scale {type(scheduler).__name__}, whose rates are not multiples "
            "of base rates: leave it out, or choose another lr_scheduler_type."
        )
    return scheduler


def scale_of(trainer: Any) -> float | None:
    """Return ``pss_lr_scale`` from the arguments of a trainer, or None if it was not given."""
    scale: float | None = getattr(trainer.args, "pss_lr_scale", None)
    return scale


def refuse_own_schedule(trainer: Any) -> None:
    """Raise an error if ``pss_lr_scale`` is set and DeepSpeed's configuration has a schedule.

    Raises:
        ConfigurationError: Both are set.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if scale_of(trainer) is not None and plugin and "scheduler" in plugin.deepspeed_config:
        raise ConfigurationError(
            "pss_lr_scale scales the Trainer's schedule, and this DeepSpeed configuration has "
            "a scheduler of its own: change the rates there, or leave pss_lr_scale out."
        )
