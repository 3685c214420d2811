"""A tiny trainer under a guard, as a sweep builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import arguments, gpt2, token_rows
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_pss import PSSTrainer
from hf_pss.evidence.guard_callbacks import TimedCallback
from hf_pss.evidence.guards import Guard

SETTINGS = TrainingArguments("unused", learning_rate=3e-3, weight_decay=0.1, use_cpu=True)


def trainer_of(
    folder: Path, guard: Guard, *, model: PreTrainedModel | None = None, **options: Any
) -> tuple[Trainer, TimedCallback | None]:
    set_seed(7)
    model = model if model is not None else gpt2(num_layers=2)
    if guard.prepare is not None:
        guard.prepare(model)
    if guard.max_grad_norm is not None:
        options["max_grad_norm"] = guard.max_grad_norm
    optimizer = guard.optimizer(model, SETTINGS) if guard.optimizer is not None else None
    trainer = PSSTrainer(
        model=model,
        args=arguments(folder, save_strategy="no", **options),
        train_dataset=token_rows(),
        optimizers=(optimizer, None),
        pss_config=guard.pss,
    )
    own = guard.callback(trainer) if guard.callback is not None else None
    if own is not None:
        trainer.add_callback(own)
    return trainer, own
