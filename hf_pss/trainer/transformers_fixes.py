"""Work around a bug in transformers: a resumed Trainer does not load renamed expert weights.

transformers saves the experts of Mixtral, Qwen-MoE and some other models as separate tensors.
`from_pretrained` stacks them when it loads them, so their names in memory differ from their names
in the checkpoint. `Trainer` resumes with `load_state_dict` instead. In transformers 5.23 it warns
about missing keys and leaves the experts unchanged, so the run would continue with wrong experts.
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
    """Mixin that also loads the renamed weights of the best checkpoint.

    List it to the left of a Trainer class.
    """

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        trainer: Any = self
        load_renamed_(trainer.model, Path(trainer.state.best_model_checkpoint))


def load_renamed_(model: object, checkpoint: Path) -> tuple[str, ...]:
    """Load the weights that the Trainer skipped because it loads weights by name.

    `from_pretrained` maps the names, so memory temporarily holds a second copy of the model.

    Args:
        model: The model to change. The function ignores a model that is not a `PreTrainedModel`. It
            also ignores a sharded model, because the checkpoints of sharded models keep the names
            that the weights have in memory.
        checkpoint: A folder with safetensors files. If it has none, the function does nothing.

    Returns:
        The names of the weights that were loaded.
    """
    saved = _saved_names(checkpoint)
    if not saved or not isinstance(model, PreTrainedModel):
        return ()
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        return ()
    # A checkpoint holds a tied weight once, under one of its names.
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
    # The Trainer has just warned about missing keys. This message adds that they are loaded.
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
