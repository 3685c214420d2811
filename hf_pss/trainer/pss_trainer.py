"""PSSTrainer: a Trainer that notices loss explosions and repairs the weights; one line differs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.hooks import StepHooks, check_seams, claim_, refuse_backends
from hf_pss.trainer.optimizers import refuse_two_optimizers

__all__ = ["PSSTrainer", "PSSTrainerMixin"]


class PSSTrainerMixin(StepHooks):
    """Puts PSS into any Trainer subclass: ``class MyTrainer(PSSTrainerMixin, SFTTrainer): ...``.

    Args:
        args: Whatever the Trainer takes.
        pss_config: The options of PSS. None takes them from `PSSTrainingArguments` where the
            trainer has these, and the preset ``anchored`` otherwise.
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
                    f"it hears nothing: write class {cls.__name__}(PSSTrainerMixin, "
                    f"{other.__name__})."
                )

    def __init__(self, *args: Any, pss_config: PSSConfig | None = None, **kwargs: Any) -> None:
        check_seams(type(self))
        super().__init__(*args, **kwargs)
        refuse_backends(self)
        refuse_two_optimizers(self)
        claim_(self)
        if self._listener() is None:
            self.add_callback(PSSCallback(pss_config))  # type: ignore[attr-defined]
        elif pss_config is not None:
            raise ConfigurationError(
                "You gave both pss_config and a PSSCallback, which has its own: give one of them."
            )


class PSSTrainer(PSSTrainerMixin, Trainer):
    """transformers' Trainer with Parametric Singularity Smoothing (arXiv 2602.01308).

    Takes exactly what Trainer takes. With plain `TrainingArguments` PSS runs its preset
    ``anchored``; `PSSTrainingArguments` or ``pss_config`` say otherwise. A run in which PSS never
    intervenes is bit for bit the run of the plain Trainer. ::

        trainer = PSSTrainer(model=model, args=args, train_dataset=dataset)
        trainer.train()
    """
