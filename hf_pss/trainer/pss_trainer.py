"""PSSTrainer: a Trainer that notices loss explosions and repairs the weights; one line differs."""

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
    """Puts PSS into any Trainer subclass: ``class MyTrainer(PSSTrainerMixin, SFTTrainer): ...``.

    It adds four independent parts: `PSSCallback`, safe checkpoints and rollback (`RollbackMixin`),
    ``pss_optim`` and ``pss_lr_scale`` (`OptimizerMixin`), and fixes of transformers.

    Args:
        args: Whatever the Trainer takes.
        pss_config: The options of PSS. None takes them from `PSSTrainingArguments` where the
            trainer has these, and the preset ``anchored`` otherwise.
        recovery: The options of checkpoints and rollback; None likewise.
        kwargs: Whatever the Trainer takes.

    Raises:
        IncompatibleVersionError: This release of transformers lacks a method that PSS needs.
        ConfigurationError: Both pss_config and a PSSCallback were given, the trainer runs under
            FSDP1 or Megatron-LM, or ``pss_optim`` was given and another optimizer, too. When the
            class is made: the mixin stands to the right of a Trainer class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        in_front = cls.__mro__[: cls.__mro__.index(PSSTrainerMixin)]
        for other in in_front:
            # Its methods would run instead of PSS's, and the run would be a plain one.
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
        # An observed run saves and stops as the plain Trainer's does.
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

    Takes exactly what Trainer takes. With plain `TrainingArguments` PSS runs its preset
    ``anchored``; `PSSTrainingArguments` or ``pss_config`` select other options. A run in which PSS
    never intervenes is bit for bit the run of the plain Trainer. ::

        trainer = PSSTrainer(model=model, args=args, train_dataset=dataset)
        trainer.train()
    """
