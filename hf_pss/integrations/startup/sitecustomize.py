"""Make every Trainer of this process join PSS before it trains.

Python imports a module of this name when it starts, and `hf-pss exec` puts this folder in front of
PYTHONPATH. The module does nothing without the variable that `hf-pss exec` sets. It imports only
what Python has loaded anyway, because every Python process of the command runs it. Afterwards it
runs the sitecustomize that it hides, if there is one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "transformers.trainer"


class TrainerFinder:
    """Finds transformers.trainer as usual, and wraps ``Trainer.train`` after the import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of transformers.trainer, and None for any other module."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                wrap_train_(module.Trainer)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrap_train_(trainer_class: Any) -> None:
    """Make trainers of this class and of its subclasses join PSS when their training begins."""
    train = trainer_class.train

    @functools.wraps(train)
    def train_with_pss(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            from hf_pss.integrations.every_trainer import join
        except ImportError as error:
            error.add_note(f"hf-pss exec: install hf-pss for {sys.executable} as well.")
            raise
        join(self)
        return train(self, *args, **kwargs)

    trainer_class.train = train_with_pss


def _run_hidden_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize" and "HF_PSS_EXEC" in os.environ:
    sys.meta_path.insert(0, TrainerFinder())
    _run_hidden_one()
