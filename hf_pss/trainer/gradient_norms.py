"""GradientNorms, which logs the gradient norm of each parameter in any Trainer, without PSS."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed import Backend, backend_for
from hf_pss.models.measurements import gradient_norms
from hf_pss.models.selection import named_parameters_canonical
from hf_pss.models.selection.by_name import place_of
from hf_pss.trainer.backend_refusals import refuse_backends
from hf_pss.trainer.seams import trainer_of, wrapped


class GradientNorms(TrainerCallback):
    """Adds the gradient norm of each parameter to the Trainer's log, as ``grad_norm/NAME``.

    ```python
    trainer = Trainer(..., callbacks=[GradientNorms()])
    ```

    The norms are those of the logged step, before clipping, without loss scaling, and over all
    ranks. Steps that are not logged cost nothing. A logged step takes one pass over the gradients
    and one device-to-host read. With ``logging_strategy="epoch"`` every step is measured, because
    the callback cannot know which step ends the epoch.

    Args:
        per: ``parameter``, or ``block`` for one norm per transformer block. With ``block`` the
            parameters outside of the blocks keep their own norms.

    Raises:
        ConfigurationError: ``per`` is unknown, or the trainer runs under FSDP1, Megatron-LM or
            DeepSpeed. DeepSpeed drops the gradients before a callback can read them.
    """

    def __init__(self, per: Literal["parameter", "block"] = "parameter") -> None:
        if per not in ("parameter", "block"):
            raise ConfigurationError(f"per is 'parameter' or 'block'; you gave {per!r}.")
        self._per = per
        self._norms: dict[str, float] = {}
        self._wrappers = ExitStack()
        self._model: nn.Module | None = None
        self._backend = Backend()
        self._scaler: Any = None
        self._is_due = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Wrap the methods that clip and log, until the training ends."""
        trainer = trainer_of(self)
        if trainer is None or model is None:
            raise ConfigurationError(
                "GradientNorms cannot find the Trainer that calls it. Pass it to the Trainer, in "
                "callbacks=[GradientNorms()] or with add_callback()."
            )
        _refuse_deepspeed(trainer)
        refuse_backends(trainer)
        self._model = model
        self._backend = backend_for(named_parameters_canonical(model))
        self._wrappers.close()  # an exception may have ended the last run
        for owner, name, around in (
            (trainer.accelerator, "clip_grad_norm_", self._around_clipping),
            (trainer, "log", self._around_log),
        ):
            self._wrappers.enter_context(wrapped(owner, name, around))
        self._scaler = getattr(trainer.accelerator, "scaler", None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Find out whether the Trainer will log this step."""
        self._norms, step = {}, state.global_step + 1
        if args.logging_strategy == IntervalStrategy.STEPS:
            self._is_due = step % state.logging_steps == 0
        else:
            self._is_due = args.logging_strategy == IntervalStrategy.EPOCH
        self._is_due |= step == 1 and args.logging_first_step

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Measure after clipping, if this Trainer does not clip through its accelerator."""
        self._measure(loss_scale=1.0)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Unwrap the trainer."""
        self._wrappers.close()
        self._model = None

    def _around_clipping(self, clip_grad_norm_: Any, *args: Any, **kwargs: Any) -> Any:
        # Before clipping, a NaN is only in the gradient where it began. The clipping also removes
        # the loss scale, so at this point the gradients still have it.
        scale = 1.0
        if self._is_due and self._scaler is not None and self._scaler.is_enabled():
            scale = self._scaler.get_scale()  # reads from the device
        self._measure(loss_scale=scale)
        return clip_grad_norm_(*args, **kwargs)

    def _around_log(self, log: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update({f"grad_norm/{name}": norm for name, norm in self._norms.items()})
        log(logs, *args, **kwargs)

    def _measure(self, *, loss_scale: float) -> None:
        """Measure once in a step that is due. All ranks make this call together."""
        if not self._is_due or self._model is None:
            return
        self._is_due = False
        found = gradient_norms(named_parameters_canonical(self._model).items(), self._backend)
        if not found:
            return
        device = next(iter(found.values())).device
        norms = torch.stack([norm.to(device) for norm in found.values()])
        if self._backend.is_shared:
            squares = norms.double().square()
            self._backend.total_(squares)
            norms = squares.sqrt()
        for name, norm in zip(found, self._backend.agree(norms), strict=True):
            label = self._label(name)
            self._norms[label] = math.hypot(self._norms.get(label, 0.0), norm / loss_scale)

    def _label(self, name: str) -> str:
        place = place_of(name)
        if self._per == "parameter" or place.block is None:
            return name
        return f"{place.stack}.{place.block}".removeprefix(".")


def _refuse_deepspeed(trainer: Trainer) -> None:
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigurationError(
            "GradientNorms cannot work under DeepSpeed, which applies the update and drops the "
            "gradients before a callback can read them. Use DDP or FSDP2, or leave it out."
        )
