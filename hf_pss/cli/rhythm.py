"""How many steps a run takes, and its rhythms in steps where they were given as shares."""

from __future__ import annotations

import math

from transformers import TrainingArguments

__all__ = ["count_steps", "set_rhythms_"]


def set_rhythms_(arguments: TrainingArguments, *, num_blocks: int) -> None:
    """Turn shares of all steps into steps, as the Trainer does, but in the arguments.

    There a resumed run compares them with its checkpoint's, and would warn of 0.1 against 80.
    """
    total = count_steps(arguments, num_blocks=num_blocks)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(arguments, name)
        if share is not None and 0 < share < 1:
            setattr(arguments, name, math.ceil(share * total))


def count_steps(arguments: TrainingArguments, *, num_blocks: int) -> int:
    """Return how many optimizer steps a run over so many blocks takes."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches: float = num_blocks / (arguments.train_batch_size * arguments.world_size)
    whole = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    a_pass: int = max(1, math.ceil(whole / arguments.gradient_accumulation_steps))
    epochs: float = arguments.num_train_epochs
    total: int = math.ceil(epochs * a_pass)
    return total
