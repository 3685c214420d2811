"""Parametric Singularity Smoothing for Hugging Face Transformers (arXiv 2602.01308)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_pss.config import PRESETS as PRESETS
    from hf_pss.config import PSSConfig as PSSConfig
    from hf_pss.config import RecoveryConfig as RecoveryConfig
    from hf_pss.controller import PSSController as PSSController
    from hf_pss.errors import ConfigurationError as ConfigurationError
    from hf_pss.errors import IncompatibleVersionError as IncompatibleVersionError
    from hf_pss.errors import NonFiniteError as NonFiniteError
    from hf_pss.errors import PSSError as PSSError
    from hf_pss.errors import SelectionError as SelectionError
    from hf_pss.errors import StateError as StateError
    from hf_pss.models.selection import select_matrices as select_matrices
    from hf_pss.records.events import StepReport as StepReport
    from hf_pss.trainer.arguments import PSSTrainingArguments as PSSTrainingArguments
    from hf_pss.trainer.callback import PSSCallback as PSSCallback
    from hf_pss.trainer.gradient_norms import GradientNorms as GradientNorms
    from hf_pss.trainer.pss_trainer import PSSTrainer as PSSTrainer
    from hf_pss.trainer.pss_trainer import PSSTrainerMixin as PSSTrainerMixin
    from hf_pss.trainer.rollback import RollbackMixin as RollbackMixin
    from hf_pss.trainer.safe_checkpoints import SafeCheckpointsMixin as SafeCheckpointsMixin

# Name to module. Imported at first use: torch and transformers take seconds.
_PUBLIC = {
    "PRESETS": "config",
    "PSSConfig": "config",
    "RecoveryConfig": "config",
    "PSSController": "controller",
    "StepReport": "records.events",
    "ConfigurationError": "errors",
    "IncompatibleVersionError": "errors",
    "NonFiniteError": "errors",
    "PSSError": "errors",
    "SelectionError": "errors",
    "StateError": "errors",
    "PSSTrainingArguments": "trainer.arguments",
    "PSSCallback": "trainer.callback",
    "GradientNorms": "trainer.gradient_norms",
    "PSSTrainer": "trainer.pss_trainer",
    "PSSTrainerMixin": "trainer.pss_trainer",
    "RollbackMixin": "trainer.rollback",
    "SafeCheckpointsMixin": "trainer.safe_checkpoints",
    "select_matrices": "models.selection",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_pss' has no attribute {name!r}")
    return getattr(import_module(f"hf_pss.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
