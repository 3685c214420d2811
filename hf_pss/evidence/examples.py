"""The rows that a recipe trains and validates on: tokens, masked tokens or images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_pss.errors import ConfigurationError, how_to_install
from hf_pss.evidence.corpus import Corpus, build_corpus
from hf_pss.evidence.data import unigram_entropy_nats
from hf_pss.evidence.recipes import Recipe

_MASK_TOKEN = "<|mask|>"
_VALIDATION_SEED = 0
_NUM_DIGITS_TO_TRAIN = 1_500

Tensors: TypeAlias = dict[str, torch.Tensor]
Collator: TypeAlias = Callable[[list[Tensors]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Examples:
    """The rows of one run."""

    train: Dataset[Tensors] | list[Tensors]
    validation: list[Tensors]
    """Rows from all over the validation text, and the same for every run."""
    unigram_entropy_nats: float
    """Loss of a model that predicts the frequencies of the labels."""
    fingerprint: str
    """Equal fingerprints mean equal rows, except for masks."""
    collator: Collator = default_data_collator
    """Makes a batch of rows."""


class MaskingCollator:
    """Masks 15 % of the tokens of each row, as BERT does, and keeps rows that are masked already.

    Args:
        tokenizer: A tokenizer with a mask token.
        seed: Seed of the generator that draws the masks. Equal seeds give equal masks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer, seed=seed)
        # The collator would draw from torch's global generator for the seed 0, and it refuses to
        # make a generator in a worker of a sweep.
        self._mask.generator = self._mask.get_generator(seed)

    def __call__(self, rows: list[Tensors]) -> dict[str, Any]:
        """Return a batch; `labels` is -100 wherever the model predicts nothing."""
        if not torch.equal(rows[0]["input_ids"], rows[0]["labels"]):
            return dict(default_data_collator(rows))
        return dict(self._mask([{"input_ids": row["input_ids"]} for row in rows]))


def examples_of(recipe: Recipe, *, seed: int) -> Examples:
    """Return the rows of a recipe.

    Args:
        recipe: Determines the corpus, and whether tokens are masked.
        seed: The run's seed, which determines the masks of the training rows. The masks of the
            validation rows are the same for every run.

    Raises:
        ConfigurationError: The corpus cannot be built, or scikit-learn is missing.
    """
    if recipe.corpus == "digits":
        return _digits()
    corpus = _corpus(recipe.corpus, recipe.vocab_size, recipe.context_length)
    num_blocks = len(corpus.validation)
    evenly = torch.linspace(0, num_blocks - 1, min(recipe.num_eval_blocks, num_blocks))
    validation = [corpus.validation[int(i)] for i in evenly]
    known = corpus.unigram_entropy_nats, corpus.fingerprint
    if recipe.architecture != "bert":
        return Examples(corpus.train, validation, *known)
    corpus.tokenizer.add_special_tokens({"mask_token": _MASK_TOKEN})
    masked = MaskingCollator(corpus.tokenizer, _VALIDATION_SEED)(validation)
    pairs = zip(masked["input_ids"], masked["labels"], strict=True)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    return Examples(corpus.train, rows, *known, MaskingCollator(corpus.tokenizer, seed))


@cache
def _corpus(name: str, vocab_size: int, context_length: int) -> Corpus:
    return build_corpus(name, vocab_size=vocab_size, context_length=context_length, max_tokens=None)


@cache
def _digits() -> Examples:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigurationError(
            f"The corpus digits comes from scikit-learn. {how_to_install('scikit-learn')}"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images / digits.images.max(), dtype=torch.float32)
    labels = torch.tensor(digits.target)
    rows = [{"pixel_values": i[None], "labels": n} for i, n in zip(images, labels, strict=True)]
    train, validation = rows[:_NUM_DIGITS_TO_TRAIN], rows[_NUM_DIGITS_TO_TRAIN:]
    entropy = unigram_entropy_nats(digits.target.astype(np.int32))
    return Examples(train, validation, entropy, fingerprint="digits")
