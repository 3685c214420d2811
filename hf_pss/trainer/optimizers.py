"""OptimizerMixin, which adds ``pss_optim`` and ``pss_lr_scale`` to a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import SCHEDULER_NAME

from hf_pss.errors import ConfigurationError
from hf_pss.trainer.optional import optional_part
from hf_pss.trainer.resuming import Kind, kind_of, move_to_, saved_kind
from hf_pss.trainer.seams import TrainerPart

logger = logging.getLogger(__name__)


class OptimizerMixin(TrainerPart):
    """Mixin that adds ``pss_optim`` and ``pss_lr_scale``. It does not need PSS.

    List it to the left of a Trainer class. It builds the optimizer that ``pss_optim`` names, and
    multiplies the rates of the schedule by ``pss_lr_scale``, also in a resumed run.

    The state of an optimizer is loaded only into an optimizer of the same kind. The checkpoint may
    come from a different kind, for example from AdamW if the run uses Muon. Then a resume takes the
    weights, the position of the schedule and the position in the data, and logs a warning. The
    momentum and the second moments start fresh.

    Raises:
        ConfigurationError: Options contradict ``pss_optim``.
    """

    _kept_chosen: Any = None
    _given_rates: list[float] | None = None
    """The base rates of the schedule when it was built, one for each parameter group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._chosen is not None:
            optional_part("refuse_two_optimizers")(self)

    @property
    def _chosen(self) -> Any:
        """The `ChosenOptimizer` of this trainer, or None without ``pss_optim``."""
        if getattr(self.args, "pss_optim", None) is None:
            return None
        if self._kept_chosen is None:
            self._kept_chosen = optional_part("ChosenOptimizer")(self)
        return self._kept_chosen

    @property
    def _scale(self) -> float | None:
        scale: float | None = getattr(self.args, "pss_lr_scale", None)
        return scale

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and afterwards restore transformers' attention functions, even after an exception.

        Raises:
            ConfigurationError: ``pss_lr_scale`` was given, and the schedule cannot be scaled.
        """
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self._scale is not None and plugin and "scheduler" in plugin.deepspeed_config:
            raise ConfigurationError(
                "pss_lr_scale scales the Trainer's schedule, and this DeepSpeed configuration has "
                "a scheduler of its own: change the rates there, or leave pss_lr_scale out."
            )
        # The list is created here and filled later, because under DeepSpeed a shallow copy of the
        # trainer builds the schedule.
        self._given_rates = []
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._kept_chosen is not None:
                self._kept_chosen.stop_measuring()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer that ``pss_optim`` names, unless the trainer already has one."""
        if self.optimizer is None and (chosen := self._chosen) is not None:
            given = next(iter((*args, *kwargs.values())), None)
            chosen.build(self.model if given is None else given)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build and scale the schedule, and set the length of the run in the optimizer."""
        if (chosen := self._chosen) is not None:
            chosen.set_length(args[0] if args else kwargs["num_training_steps"])
        scheduler = super().create_scheduler(*args, **kwargs)
        given = self._given_rates = [] if self._given_rates is None else self._given_rates
        given[:] = _base_rates(scheduler)
        if (scale := self._scale) is not None:
            set_base_rates_(scheduler, [rate * scale for rate in given])
        return scheduler

    def rescale_rates_(self, checkpoint: str) -> None:
        """Give a resumed schedule the rates of this run, multiplied by ``pss_lr_scale``.

        Without ``pss_lr_scale``, the rates of the checkpoint apply, as in a plain Trainer. A
        warning says so if this run was given others. If every resume uses the same factor, it is
        applied only once and not once per resume.
        """
        scale, given = self._scale, self._given_rates
        if given is None:
            return
        if scale is None:
            loaded = _base_rates(self.lr_scheduler)
            if loaded != given and self.is_world_process_zero():
                logger.warning(
                    "The schedule continues from the base rate of %s, which is %s. The rate of "
                    "this run, %s, has no effect. To use it, set pss_lr_scale=1.",
                    checkpoint,
                    _shown(loaded),
                    _shown(given),
                )
            return
        wanted = [rate * scale for rate in given]
        loaded = set_base_rates_(self.lr_scheduler, wanted)
        for group, rate in zip(self.optimizer.param_groups, given, strict=True):
            group["initial_lr"] = rate  # a second train() builds its schedule from this rate
        if loaded != wanted and self.is_world_process_zero():
            logger.warning(
                "pss_lr_scale=%g: the schedule continues from a base rate of %s. The checkpoint %s "
                "has %s.",
                scale,
                _shown(wanted),
                checkpoint,
                _shown(loaded),
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, and pass the loss of the step to a rule that needs it."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if (chosen := self._chosen) is not None:
            chosen.add_loss(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the numbers of QK-clip since the last training log, with one device read, and log."""
        if "loss" in logs and (chosen := self._chosen) is not None:
            logs.update(chosen.scalars())
        super().log(logs, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        kinds = self._other_kinds(checkpoint)
        if kinds is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and (chosen := self._chosen) is not None:
                chosen.after_loading(checkpoint)
            return
        path = Path(str(checkpoint), SCHEDULER_NAME)
        move_to_(self.lr_scheduler, torch.load(path, map_location="cpu", weights_only=True))
        if self.is_world_process_zero():
            logger.warning(
                "%s was written by %s, and this run trains with %s. The weights, the position of "
                "the schedule and the position in the data are loaded. The optimizer's state "
                "starts fresh.",
                checkpoint,
                *map(_described, kinds),
            )

    def _other_kinds(self, checkpoint: str | None) -> tuple[Kind, Kind] | None:
        """Return the optimizer kinds of the checkpoint and this run, or None if they are equal."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return None
        if not Path(checkpoint, SCHEDULER_NAME).is_file():
            return None  # without scheduler.pt the Trainer loads neither state
        theirs, ours = saved_kind(Path(checkpoint)), kind_of(self.optimizer.param_groups)
        if theirs is None or theirs == ours or not any((*theirs, *ours)):
            return None  # if neither optimizer has rules, the check of the Trainer decides
        return theirs, ours


def _described(kind: Kind) -> str:
    rules = list(dict.fromkeys(rule for rule in kind if rule is not None))
    return f"groups of {' and '.join(rules)}" if rules else "an optimizer of another package"


def _shown(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates))


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
    schedule = _schedule_in(scheduler)
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
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule.base_lrs, schedule._last_lr = list(rates), now
    return before


def _base_rates(scheduler: Any) -> list[float]:
    """Return the base rates of a schedule, or none if it is not a `LambdaLR`."""
    schedule = _unwrapped(scheduler)
    return [float(x) for x in schedule.base_lrs] if type(schedule) is LambdaLR else []


def _unwrapped(scheduler: Any) -> Any:
    """Return the schedule inside Accelerate's wrappers."""
    while isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    return scheduler


def _schedule_in(scheduler: Any) -> LambdaLR:
    """Return the schedule inside Accelerate's wrappers.

    Raises:
        ConfigurationError: The schedule is not a `LambdaLR`.
    """
    schedule = _unwrapped(scheduler)
    # Other schedules keep more rates than the base rates, or derive rates from the optimizer.
    if type(schedule) is not LambdaLR:
        raise ConfigurationError(
            f"pss_lr_scale cannot scale {type(schedule).__name__}, whose rates are not multiples "
            "of base rates: leave it out, or choose another lr_scheduler_type."
        )
    return schedule
