"""PSSTrainer, a drop-in Trainer that detects loss explosions and repairs the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_pss.config import PSSConfig, RecoveryConfig
from hf_pss.errors import ConfigurationError
from hf_pss.records.messages import card_section
from hf_pss.runs.records_files import read_run_records
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.optimizers import OptimizerMixin
from hf_pss.trainer.resuming import load_renamed_
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.schedule_free import BackToTraining, leave_training
from hf_pss.trainer.seams import check_methods


class PSSTrainerMixin(RollbackMixin, OptimizerMixin):
    """Adds PSS to any Trainer subclass: ``class MyTrainer(PSSTrainerMixin, SFTTrainer): ...``.

    The mixin adds four independent parts: `PSSCallback`, safe checkpoints (`SafeCheckpointsMixin`),
    rollback (`RollbackMixin`), and ``pss_optim`` with ``pss_lr_scale`` (`OptimizerMixin`). It also
    loads weights that have different names in the checkpoint and in memory (`load_renamed_`).

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

    def __init__(
        self,
        *args: Any,
        pss_config: PSSConfig | None = None,
        recovery: RecoveryConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_methods(type(self), (RollbackMixin, OptimizerMixin))
        super().__init__(*args, recovery=recovery, **kwargs)
        if not any(isinstance(one, PSSCallback) for one in self.callback_handler.callbacks):
            PSSCallback(pss_config).attach(self)
        elif pss_config is not None:
            raise ConfigurationError(
                "You gave both pss_config and a PSSCallback, which has its own: give one of them."
            )
        self.add_callback(BackToTraining())

    def _is_on(self) -> bool:
        # A run with observe_only saves and stops like a run of the plain Trainer.
        return not PSSCallback.of(self).config_for(self.args).observe_only

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, and add the options and the events of PSS."""
        super().create_model_card(*args, **kwargs)
        if not (self.is_world_process_zero() and self._is_on()):
            return
        folder = Path(self.args.output_dir)
        options = PSSCallback.of(self).config_for(self.args).describe()
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(card_section(options, read_run_records(folder).events))

    def _after_loading(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if not self.is_deepspeed_enabled:
                load_renamed_(self.model, Path(checkpoint))
            self.rescale_rates_(checkpoint)
        super()._after_loading(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_renamed_(self.model, Path(self.state.best_model_checkpoint))

    def _before_saving(self) -> None:
        leave_training(self.optimizer, self.control)


class PSSTrainer(PSSTrainerMixin, Trainer):
    """transformers' Trainer with Parametric Singularity Smoothing (arXiv 2602.01308).

    It takes the same arguments as Trainer. With plain `TrainingArguments`, PSS uses its preset
    ``anchored``. You select other options with `PSSTrainingArguments` or ``pss_config``. If PSS
    never intervenes, the run is bit-identical to a run of the plain Trainer.

    ```python
    trainer = PSSTrainer(model=model, args=args, train_dataset=dataset)
    trainer.train()
    ```
    """
