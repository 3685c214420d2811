"""PSSTrainer, a drop-in Trainer that detects loss explosions and repairs the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.optimizers import OptimizerMixin, refuse_two_optimizers
from hf_pss.trainer.recovery import RecoveryConfig
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.schedule_free import BackToTraining, leave_training
from hf_pss.trainer.seams import check_methods
from hf_pss.trainer.transformers_fixes import TransformersFixesMixin, load_renamed_

__all__ = ["PSSTrainer", "PSSTrainerMixin"]

_MIXINS = (RollbackMixin, OptimizerMixin, TransformersFixesMixin)


class PSSTrainerMixin(RollbackMixin, OptimizerMixin, TransformersFixesMixin):
    """Adds PSS to any Trainer subclass: ``class MyTrainer(PSSTrainerMixin, SFTTrainer): ...``.

    The mixin adds four independent parts: `PSSCallback`, safe checkpoints and rollback
    (`RollbackMixin`), ``pss_optim`` and ``pss_lr_scale`` (`OptimizerMixin`), and fixes for
    bugs in transformers.

    Args:
        args: The positional arguments of the Trainer.
        pss_config: The options of PSS. If it is None, they come from the trainer's
            `PSSTrainingArguments`. A trainer with other arguments gets the preset ``anchored``.
        recovery: The options for checkpoints and rollback. If it is None, they come from the
            training arguments or are the defaults.
        kwargs: The keyword arguments of the Trainer.

    Raises:
        IncompatibleVersionError: The installed transformers lacks a method that PSS needs.
        ConfigurationError: Both pss_config and a PSSCallback were given, the trainer runs
            under FSDP1 or Megatron-LM, or ``pss_optim`` and another optimizer were given. The
            error is also raised when a subclass is defined that lists the mixin to the right
            of a Trainer class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        in_front = cls.__mro__[: cls.__mro__.index(PSSTrainerMixin)]
        for other in in_front:
            # The methods of that class would run instead of the methods of the mixin.
            if issubclass(other, Trainer) and not issubclass(other, PSSTrainerMixin):
                raise ConfigurationError(
                    f"{cls.__name__} has PSSTrainerMixin to the right of {other.__name__}, where "
                    f"it has no effect: write class {cls.__name__}(PSSTrainerMixin, "
                    f"{other.__name__})."
                )

    def __init__(
        self,
        *args: Any,
        pss_config: PSSConfig | None = None,
        recovery: RecoveryConfig | None = None,
        **kwargs: Any,
    ) -> None:
        trainer: Any = self
        check_methods(type(trainer), _MIXINS)
        super().__init__(*args, recovery=recovery, **kwargs)
        refuse_two_optimizers(trainer)
        if not any(isinstance(one, PSSCallback) for one in trainer.callback_handler.callbacks):
            PSSCallback(pss_config).attach(trainer)
        elif pss_config is not None:
            raise ConfigurationError(
                "You gave both pss_config and a PSSCallback, which has its own: give one of them."
            )
        trainer.add_callback(BackToTraining())

    def _is_on(self) -> bool:
        # A run with observe_only saves and stops like a run of the plain Trainer.
        trainer: Any = self
        return not PSSCallback.of(trainer).config_for(trainer.args).observe_only

    def _after_loading(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is not None:
            if not trainer.is_deepspeed_enabled:
                load_renamed_(trainer.model, Path(checkpoint))
            self.rescale_rates_(checkpoint)
        super()._after_loading(checkpoint)

    def _before_saving(self) -> None:
        super()._before_saving()
        trainer: Any = self
        leave_training(trainer.optimizer, trainer.control)


class PSSTrainer(PSSTrainerMixin, Trainer):
    """transformers' Trainer with Parametric Singularity Smoothing (arXiv 2602.01308).

    It takes the same arguments as Trainer. With plain `TrainingArguments`, PSS uses its preset
    ``anchored``. You select other options with `PSSTrainingArguments` or ``pss_config``. If PSS
    never intervenes, the run is bit-identical to a run of the plain Trainer. ::

        trainer = PSSTrainer(model=model, args=args, train_dataset=dataset)
        trainer.train()
    """
