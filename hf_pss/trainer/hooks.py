"""The places where a Trainer must be overheard, and the check that they are still there."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

from hf_pss.errors import ConfigurationError, IncompatibleVersionError
from hf_pss.trainer.arguments import PSSTrainingArguments
from hf_pss.trainer.batch_loss import BatchLoss
from hf_pss.trainer.optimizers import ChosenOptimizer, refuse_two_optimizers
from hf_pss.trainer.rollback import Survival
from hf_pss.trainer.transformers_fixes import load_renamed_

__all__ = [
    "StepHooks",
    "StepListener",
    "check_seams",
    "claim_",
    "hook",
    "refuse_backends",
]

# Methods of transformers' Trainer that hf_pss overrides or calls, with the parameters that it
# relies on. The first two are private: they exist since transformers 5.3.
_SEAMS = {
    "_clip_grad_norm": ("self", "model"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_load_best_model": ("self",),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "log": ("self", "logs", "start_time"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_callback_state": ("self",),
    "create_optimizer": ("self",),
    "create_scheduler": ("self", "num_training_steps"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "train": ("self", "resume_from_checkpoint"),
    "_init_training_state": ("self", "num_update_steps_per_epoch"),
    "_run_epoch": ("self",),
    "_maybe_log_save_evaluate": ("self",),
    "_get_output_dir": ("self", "trial"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finalize_training": ("self", "trial"),
    "_finish_current_push": ("self",),
    "_load_rng_state": ("self", "checkpoint"),
}
# How the Trainer, or hf_pss in its place, calls those that subclasses may override: the number of
# arguments by position, and the names of the others. What an override calls them is its own matter.
_CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "_clip_grad_norm": (1, ()),
    "_get_grad_norm": (1, ("grad_norm",)),
    "_load_best_model": (0, ()),
    "training_step": (3, ()),
    "log": (1, ()),
    "_load_from_checkpoint": (1, ()),
    "_load_callback_state": (0, ()),
    "create_optimizer": (0, ()),
    "create_scheduler": (0, ("num_training_steps",)),
    "_load_optimizer_and_scheduler": (1, ()),
    "_get_output_dir": (1, ()),
    "_save_checkpoint": (2, ()),
    "_push_from_checkpoint": (1, ()),
    "_finish_current_push": (0, ()),
    "_load_rng_state": (1, ()),
}


class StepListener(ABC):
    """A callback that hears what callbacks are not told: losses, and norms before clipping."""

    handler: CallbackHandler | None = None
    """The trainer's, which knows the other callbacks; from the first step or resume on."""
    tries_interventions = False
    """Whether it wants `batch_loss`."""
    batch_loss: BatchLoss | None = None
    """The loss of a micro-batch of the last step without trouble, computed when asked for."""

    @abstractmethod
    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one micro-batch, on its device."""

    @abstractmethod
    def before_clipping(self) -> None:
        """Gradients of this step are complete and not clipped yet."""

    @abstractmethod
    def see_grad_norm(
        self,
        norm: Tensor | float | None,
        *,
        scaler_is_active: bool,
        update_is_discarded: bool = False,
    ) -> float | None:
        """Take the global norm before clipping and return it as a host float.

        Args:
            norm: None where the trainer has none to give.
            scaler_is_active: Losses are scaled; gradients overflow now and then by design.
            update_is_discarded: This step's update has been dropped already, by DeepSpeed.
        """

    @abstractmethod
    def extend_logs(self, logs: dict[str, float]) -> None:
        """Add to a training log before it goes to the reporters."""


class StepHooks(Survival, ChosenOptimizer):
    """Mixin, left of a Trainer class: hands every step's loss and norm to the `StepListener`."""

    def _listener(self) -> StepListener | None:
        handler = self.callback_handler  # type: ignore[attr-defined]
        listener = next((c for c in handler.callbacks if isinstance(c, StepListener)), None)
        if listener is not None:
            listener.handler = handler
        return listener

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch and let the listener see its loss."""
        listener = self._listener()
        with self._remembered_batch(listener):
            loss = super().training_step(*args, **kwargs)
        if listener is not None:
            listener.see_loss(loss)
        return loss

    def _remembered_batch(self, listener: StepListener | None) -> AbstractContextManager[None]:
        if listener is None or not listener.tries_interventions:
            return nullcontext()
        if listener.batch_loss is None:
            listener.batch_loss = BatchLoss(self)
        return listener.batch_loss.listening()

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if listener := self._listener():
            listener.before_clipping()
        return super()._clip_grad_norm(*args, **kwargs)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        listener = self._listener()
        if listener and grad_norm is None:
            listener.before_clipping()  # max_grad_norm is 0: the norm is taken here, unclipped
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if listener is None:
            return norm
        scaler = getattr(self.accelerator, "scaler", None)  # type: ignore[attr-defined]
        is_active = scaler is not None and scaler.is_enabled()
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # type: ignore[attr-defined]
            return listener.see_grad_norm(norm, scaler_is_active=is_active)
        # DeepSpeed scales fp16 losses itself, has stepped already, and gives a host float. Before
        # 0.19 that is -1 where the norm is not finite.
        return listener.see_grad_norm(
            math.inf if norm is not None and norm < 0 else norm,
            scaler_is_active=is_active or self.args.fp16,  # type: ignore[attr-defined]
            update_is_discarded=not model.was_step_applied(),
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the listener's numbers in every training log."""
        if (listener := self._listener()) and "loss" in logs:
            listener.extend_logs(logs)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        # As it was called: sentence-transformers' override takes no model.
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        model = next(iter((*args, *kwargs.values())), None)
        loaded = model if model is not None else self.model  # type: ignore[attr-defined]
        load_renamed_(loaded, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        load_renamed_(
            self.model,  # type: ignore[attr-defined]
            Path(self.state.best_model_checkpoint),  # type: ignore[attr-defined]
        )

    def _load_callback_state(self) -> None:
        # With restore_callback_states_from_checkpoint the Trainer builds callbacks anew, from the
        # checkpoint's arguments. The listener restores itself, in place, with or without that.
        name = type(self._listener()).__name__
        saved_states = self.state.stateful_callbacks  # type: ignore[attr-defined]
        saved = saved_states.pop(name, None)
        super()._load_callback_state()  # type: ignore[misc]
        if saved is not None:
            saved_states[name] = saved


def check_seams(trainer_class: type[Trainer]) -> None:
    """Make sure that a Trainer class has the methods that `StepHooks` overrides.

    Raises:
        IncompatibleVersionError: transformers lacks one, or its own takes other arguments; or the
            override of some class cannot be called as the Trainer calls it. The message names whom.
    """
    for name, wanted in _SEAMS.items():
        own = getattr(Trainer, name, None)
        found = inspect.signature(own).parameters if own is not None else {}
        # Other packages patch Trainer, with wrappers that pass on whatever they are given.
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
        if own is None or not (takes_any or set(wanted) <= set(found)):
            has = f"takes ({', '.join(found)})" if own is not None else "does not exist"
            raise IncompatibleVersionError(
                f"Trainer.{name} {has}, but hf_pss {_own_version()} needs it with "
                f"({', '.join(wanted)}). You have transformers {transformers.__version__}; "
                "install one that hf_pss was made for (5.3 or newer; tested with 5.23)."
            )
    # A class that has StepHooks already answers with these: look at what lies behind them.
    mro = trainer_class.__mro__
    behind = mro[mro.index(ChosenOptimizer) + 1 :] if ChosenOptimizer in mro else mro
    for name, (num_by_position, keywords) in _CALLS.items():
        owner = next((cls for cls in behind if name in vars(cls)), Trainer)
        if owner is not Trainer and not _takes(getattr(owner, name), num_by_position, keywords):
            takes = ", ".join(inspect.signature(getattr(owner, name)).parameters)
            given = ", ".join(_SEAMS[name])
            raise IncompatibleVersionError(
                f"{owner.__module__}.{owner.__name__}.{name} takes ({takes}), and the Trainer of "
                f"transformers {transformers.__version__} calls it with ({given}): let "
                f"{owner.__name__}.{name} take these."
            )


def _takes(method: Any, num_by_position: int, keywords: tuple[str, ...]) -> bool:
    """Tell whether a method, unbound, can be called so."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # written in C, or no function: it is not ours to judge
        return True
    try:
        signature.bind(*[None] * (1 + num_by_position), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def claim_(trainer: Trainer) -> None:
    """Let the arguments know that PSS is at work: under a plain Trainer they warn."""
    if isinstance(trainer.args, PSSTrainingArguments):
        trainer.args.pss_is_heard = True


def hook(trainer: Trainer, listener: StepListener) -> None:
    """Add a listener to a trainer that was built without it, and let it hear every step.

    The trainer's class becomes a subclass of itself with `StepHooks` in front, under the same
    name: one way of overhearing for every trainer, and its own overrides stay in force.

    Raises:
        ConfigurationError: The trainer has a listener already, or see `refuse_backends`.
        IncompatibleVersionError: See `check_seams`.
    """
    if any(isinstance(callback, StepListener) for callback in trainer.callback_handler.callbacks):
        raise ConfigurationError(
            "This trainer has a PSSCallback already; one trainer takes one. Attach it once, and "
            "give PSSTrainer its options through pss_config or PSSTrainingArguments."
        )
    own = type(trainer)
    check_seams(own)
    refuse_backends(trainer)
    refuse_two_optimizers(trainer)
    claim_(trainer)
    if not isinstance(trainer, StepHooks):
        hooked = type(own.__name__, (StepHooks, own), {"__module__": own.__module__})
        trainer.__class__ = hooked
    trainer.add_callback(listener)


def refuse_backends(trainer: Trainer) -> None:
    """Refuse the backends whose weights PSS cannot read or write, before anything is trained.

    Raises:
        ConfigurationError: The trainer runs under FSDP1, Megatron-LM, or DeepSpeed without ZeRO.
    """
    kind = trainer.accelerator.distributed_type
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_fsdp1 = kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 2) == 1
    if is_fsdp1 or kind == DistributedType.MEGATRON_LM:
        raise ConfigurationError(
            f"This trainer runs under {'FSDP1' if is_fsdp1 else kind.value}, which flattens weight "
            "matrices. Use DDP, FSDP2 (fsdp_config: {version: 2}) or DeepSpeed ZeRO."
        )
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 0:
        raise ConfigurationError(
            "This trainer runs under DeepSpeed with ZeRO stage 0, where the weights that the "
            "optimizer updates are out of reach. Use stage 1, 2 or 3, or DDP."
        )


def _own_version() -> str:
    from importlib.metadata import version

    return version("hf-pss")
