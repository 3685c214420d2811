"""Faults of transformers that would harm a run, mended where the Trainer loads weights.

Weights that a checkpoint keeps under other names than the model has in memory.

transformers saves the experts of Mixtral, Qwen-MoE and others one by one and stacks them when
`from_pretrained` loads them. `Trainer` resumes with `load_state_dict`, warns about missing keys and
leaves the experts as they were (5.23). The run would continue with wrong experts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

__all__ = ["TransformersFixesMixin", "load_renamed_"]

logger = logging.getLogger(__name__)


class TransformersFixesMixin:
    """Mixin, left of a Trainer class: loads renamed weights of the best checkpoint, too."""

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        trainer: Any = self
        load_renamed_(trainer.model, Path(trainer.state.best_model_checkpoint))


def load_renamed_(model: object, checkpoint: Path) -> tuple[str, ...]:
    """Load the weights that loading by name has skipped.

    `from_pretrained` maps the names, so a second copy of the model is in memory for a while.

    Args:
        model: Anything but a `PreTrainedModel` is left alone, and so is one in shards: these are
            loaded from checkpoints that keep the names of memory.
        checkpoint: A folder with safetensors; without them nothing is done.

    Returns:
        The names of the weights that were loaded.
    """
    saved = _saved_names(checkpoint)
    if not saved or not isinstance(model, PreTrainedModel):
        return ()
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        return ()
    # A tied weight is saved once, under one of its names.
    there = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    missing = tuple(
        name
        for name, tensor in state.items()
        if name not in saved and tensor.data_ptr() not in there
    )
    if not missing:
        return ()
    twin = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    model.load_state_dict({name: twin[name] for name in missing}, strict=False)
    # The Trainer has just warned of missing keys: this is the other half of that story.
    logger.warning(
        "%d weights of %s have other names there, such as %s; loaded as from_pretrained does.",
        len(missing),
        checkpoint,
        missing[0],
    )
    return missing


def _saved_names(checkpoint: Path) -> set[str]:
    index, single = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return set()
