"""PSS in a Lightning Trainer, around `PSSController`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from hf_pss.config import PSSConfig, check_config
from hf_pss.controller import PSSController
from hf_pss.errors import ConfigurationError
from hf_pss.models.intervention import EvaluateLoss
from hf_pss.records.events import StepReport
from hf_pss.runs.folder import EVENTS_FILE
from hf_pss.runs.records_files import JsonLines, log_scalars

logger = logging.getLogger(__name__)


class PSSLightningCallback(Callback):
    """Parametric Singularity Smoothing for a Lightning Trainer with automatic optimization.

    ```python
    trainer = lightning.Trainer(callbacks=[PSSLightningCallback()])
    trainer.fit(module, loader)
    ```

    PSS judges the gradients before Lightning clips them, and smooths the weights at the end of the
    batch, before a checkpoint of this batch is saved. It writes its events to ``pss_events.jsonl``
    in the log folder, and its numbers to the loggers of the trainer.

    Args:
        config: The options. None means the preset ``anchored``.
        evaluate_loss: The loss of one micro-batch, by which PSS tries its interventions. See
            `PSSController`.

    Raises:
        ConfigurationError: ``config`` is not a PSSConfig. Or, when a fit starts, the module has
            several optimizers or optimizes manually, or the strategy is FSDPStrategy or
            DeepSpeedStrategy.
    """

    def __init__(
        self, config: PSSConfig | None = None, *, evaluate_loss: EvaluateLoss | None = None
    ) -> None:
        if config is not None:
            check_config(config)
        self.config, self.evaluate_loss = config, evaluate_loss
        self.controller: PSSController | None = None
        self.report: StepReport | None = None
        self._events: JsonLines | None = None
        self._saved: Mapping[str, Any] | None = None
        self._loss: Tensor | None = None
        self._is_updating = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the controller, and restore its state if a checkpoint was loaded."""
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise ConfigurationError(
                "PSSLightningCallback needs automatic optimization and one optimizer. In a module "
                "that optimizes manually, call PSSController in training_step."
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ConfigurationError(
                f"PSS cannot reach the gradients under {type(trainer.strategy).__name__}. Use one "
                "device or the strategy ddp."
            )
        self.controller = PSSController(
            pl_module,
            self.config,
            optimizer=trainer.optimizers[0],
            evaluate_loss=self.evaluate_loss,
        )
        if self._saved is not None:
            self.controller.load_state_dict(self._saved)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank
        if trainer.is_global_zero:
            self._events = JsonLines(folder / EVENTS_FILE, resumed_step=self.controller.step_number)
        self._loss, self._is_updating = None, False

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Add the loss of a micro-batch, which Lightning has divided by their number."""
        self._loss = loss.detach() + (0 if self._loss is None else self._loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the gradients, and remove them if the update must not happen."""
        controller, gradients = self.controller, _gradients(pl_module)
        if controller is None or not gradients:  # a training_step that returned None has none
            return
        controller.inspect_gradients()
        # A GradScaler has unscaled the gradients, but not the loss.
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        loss = None if is_scaled else self._loss
        norm, loss_on_host = controller.to_host(get_total_norm(gradients), loss)
        self._loss, self._is_updating = None, True
        if not controller.before_update(norm, loss_on_host, loss_scaled=is_scaled):
            for parameter in pl_module.parameters():
                parameter.grad = None  # optimizers skip parameters without a gradient

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Judge the weights and smooth them, if this batch ended with an update."""
        if self.controller is None or not self._is_updating:
            return
        self._is_updating = False
        self.report = report = self.controller.after_update()
        pl_module.log_dict(log_scalars(report.scalars))
        if self._events is not None:
            self._events.write_records(report.records)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that Lightning puts into its checkpoints."""
        return {} if self.controller is None else {"pss": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until the controller exists."""
        self._saved = state_dict.get("pss")


def _gradients(module: LightningModule) -> list[Tensor]:
    return [one.grad for one in module.parameters() if one.grad is not None]


def default_callbacks() -> list[Callback]:
    """Return a PSSLightningCallback with the default options, for Lightning's entry point."""
    return [PSSLightningCallback()]
