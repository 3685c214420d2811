"""Find the rows of the data set that a Trainer has just trained on, and their text.

Nothing is recorded while a run is healthy. The order of an epoch depends only on the seed and the
number of the epoch, so it is computed again when a step spikes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_pss.records.spikes import SpikeEvidence
from hf_pss.trainer.batch_loss import untouched_randomness

_NUM_TEXTS = 8
_NUM_CHARACTERS = 300
# Tokens of a row that are decoded. A token is rarely shorter than a character.
_NUM_TOKENS = 300


def evidence_of(
    trainer: Any, step: int, matrices: Mapping[str, Mapping[str, float]]
) -> SpikeEvidence:
    """Return the evidence of the step that the trainer is in, before its update.

    Cost: one permutation of the data set, and one read of the first rows. The random state is not
    changed. An error of the data set does not end the run, and becomes `why_unknown`.
    """
    try:
        found = indices_of_step(trainer)
        if isinstance(found, str):
            return SpikeEvidence(step, matrices, why_unknown=found)
        with untouched_randomness(trainer.model):
            texts = _texts(trainer, found[:_NUM_TEXTS])
        return SpikeEvidence(step, matrices, found, texts=texts)
    except Exception as error:
        return SpikeEvidence(step, matrices, why_unknown=f"{type(error).__name__}: {error}")


def indices_of_step(trainer: Any) -> tuple[int, ...] | str:
    """Return the rows of the current step over all ranks, or the reason why they are unknown."""
    loader = trainer.callback_handler.train_dataloader
    if isinstance(loader.dataset, IterableDataset):
        return "the training data is a stream, whose rows have no number"
    sampler = loader.batch_sampler
    num_ranks = 1
    is_padded = False
    if type(sampler) is BatchSamplerShard:
        num_ranks = 1 if sampler.split_batches else sampler.num_processes
        is_padded = sampler.even_batches and not sampler.drop_last
        sampler = sampler.batch_sampler
    elif trainer.args.world_size > 1:
        return "the data loader does not divide batches among ranks in the usual way"
    if type(sampler) is not BatchSampler:
        return f"the batches of a {type(sampler).__name__} cannot be computed again"
    rows: Any = sampler.sampler
    if type(rows) not in (SeedableRandomSampler, SequentialSampler):
        return f"the order of a {type(rows).__name__} cannot be computed again"
    if trainer.args.ignore_data_skip:
        return "ignore_data_skip makes the place in the data unknown"
    done, epoch = math.modf(trainer.state.epoch or 0.0)
    if isinstance(rows, SeedableRandomSampler):
        rows = copy.copy(rows)  # the original counts its epochs
        rows.generator = torch.Generator()
        rows.set_epoch(int(epoch))
    order = list(rows)
    group = sampler.batch_size * num_ranks
    first = round(done * len(loader)) * group
    last = first + trainer.current_gradient_accumulation_steps * group
    # With several ranks, Accelerate fills the last batches with the first rows of the epoch.
    end = len(loader) * group if is_padded or sampler.drop_last else len(order)
    return tuple(order[i % len(order)] for i in range(first, min(last, end)))


def _texts(trainer: Any, indices: tuple[int, ...]) -> tuple[str, ...]:
    tokenizer = getattr(trainer, "processing_class", None)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return ()
    dataset = trainer.callback_handler.train_dataloader.dataset
    rows = [dataset[index] for index in indices]
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        return ()
    texts = (tokenizer.decode(row["input_ids"][:_NUM_TOKENS]) for row in rows)
    return tuple(str(text)[:_NUM_CHARACTERS] for text in texts)
