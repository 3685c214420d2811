"""Tiny tasks of many kinds, which `make_labelled_logs` trains.

A task draws its batches from a seed and a step, so that a run can be repeated. Each task has three
settings of its data: `ordinary`, `hard` (a shifted and noisier distribution, which a curriculum
introduces) and a share of random labels.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

__all__ = ["TASKS", "Batch", "Task", "damaged"]

Batch = dict[str, Tensor]
_LENGTH = 32
_IGNORED = -100


@dataclass(frozen=True)
class Task:
    """One kind of training."""

    model: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int, bool, float], Batch]
    """Draws a batch from a generator, its size, whether it is hard, the share of random labels."""
    loss: Callable[[nn.Module, Batch], Tensor]
    rate: float
    """An ordinary learning rate for AdamW."""
    batch_size: int = 8
    vocab_size: int | None = None
    """The number that the model's config.json would hold."""
    small_batch: int = 2


def _integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _relabelled(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Replace a share of the labels by random classes."""
    chosen = torch.rand(labels.shape, generator=generator) < share
    random = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(chosen & (labels != _IGNORED), random, labels)


def damaged(batch: Batch, generator: torch.Generator) -> Batch:
    """Return a batch as a broken reader would deliver it.

    Integers are shuffled within the batch, labels too. Real numbers are scaled by 8 and get noise.
    """
    found = {}
    for name, value in batch.items():
        if value.is_floating_point():
            found[name] = value * 8 + 4 * _noise(generator, *value.shape)
        elif name.endswith("mask") or name.startswith("num_"):
            found[name] = value
        else:
            order = torch.randperm(value.numel(), generator=generator)
            found[name] = value.flatten()[order].view_as(value)
    return found


# Texts ------------------------------------------------------------------------------------------


@cache
def _sources(hard: bool) -> Tensor:
    """Python sources of the standard library as bytes below 128.

    The ordinary text has only lower-case letters; the hard text is unchanged.
    """
    text = "".join(inspect.getsource(module) for module in (json, textwrap, inspect))
    text = " ".join(text.split())
    if not hard:
        text = "".join(c for c in text.lower() if c.isalpha() or c == " ")
    return torch.tensor([ord(c) for c in text if ord(c) < 128])


def _excerpts(generator: torch.Generator, size: int, hard: bool) -> Tensor:
    text = _sources(hard)
    begins = _integers(generator, len(text) - _LENGTH, size)
    return torch.stack([text[begin : begin + _LENGTH] for begin in begins])


def _text(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    return {"input_ids": _relabelled(_excerpts(generator, size, hard), flip, 128, generator)}


def _chains(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    """Rows in which each token follows from the one before, with 3 % of random tokens.

    Only the hard rows follow the second rule, which the earlier training has not seen.
    """
    factor, shift = (13, 7) if hard else (5, 3)
    columns = [_integers(generator, 64, size)]
    for _ in range(_LENGTH - 1):
        columns.append((factor * columns[-1] + shift) % 64)
    return {"input_ids": _relabelled(torch.stack(columns, 1), 0.03 + flip, 64, generator)}


def _gpt2(vocab_size: int = 128, width: int = 32) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=64,
            n_embd=width,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _language_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def _summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _accumulated_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a trainer that adds 16 micro-batches and forgets to divide."""
    return 16 * _language_loss(model, batch)


@cache
def _trained_weights() -> Mapping[str, Tensor]:
    """Train a small model on one rule, from which the fine-tuning begins."""
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model = _gpt2(64, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(17)
    for _ in range(300):
        optimizer.zero_grad()
        _language_loss(model, _chains(generator, 16, False, 0.0)).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def _trained() -> nn.Module:
    model = _gpt2(64, 48)
    model.load_state_dict(_trained_weights())
    return model


def _more_chains(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    """Rows of which some follow the rule that the earlier training has not seen."""
    ordinary = _chains(generator, size, False, flip)["input_ids"]
    other = _chains(generator, size, True, flip)["input_ids"]
    chosen = torch.rand((size, 1), generator=generator) < (0.7 if hard else 0.25)
    return {"input_ids": torch.where(chosen, other, ordinary)}


def _masked(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    ids = _excerpts(generator, size, hard)
    chosen = torch.rand(ids.shape, generator=generator) < 0.2
    labels = torch.where(chosen, ids, _IGNORED)
    return {
        "input_ids": torch.where(chosen, 1, ids),
        "labels": _relabelled(labels, flip, 128, generator),
    }


def _bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


def _labels_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def _reversed(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    """Copy 6 symbols in reverse; the hard rows have 9 symbols."""
    ids = 2 + _integers(generator, 14, size, 9 if hard else 6)
    return {"input_ids": ids, "labels": _relabelled(ids.flip(1), flip, 16, generator)}


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=16,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


# Images, numbers and sound ------------------------------------------------------------------------


@cache
def _patterns(classes: int, *shape: int) -> Tensor:
    return _noise(torch.Generator().manual_seed(5), classes, *shape)


def _images(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    labels = _integers(generator, 8, size)
    noise = (3.0 if hard else 1.5) * _noise(generator, size, 3, 16, 16)
    return {
        "pixel_values": _patterns(8, 3, 16, 16)[labels] * 0.5 + noise,
        "labels": _relabelled(labels, flip, 8, generator),
    }


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=8,
        )
    )


def _numbers(scale: float) -> Callable[[torch.Generator, int, bool, float], Batch]:
    def draw(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
        inputs = (1.4 if hard else 1.0) * _noise(generator, size, 8)
        directions = _patterns(3, 8) / 2
        values = torch.sin(inputs @ directions[0]) + (inputs @ directions[1]).tanh()
        values = values + 0.2 * _noise(generator, size)
        chosen = torch.rand(size, generator=generator) < flip
        values = torch.where(chosen, 2 * _noise(generator, size), values)
        return {"inputs": inputs, "targets": scale * values}

    return draw


def _mlp(inputs: int = 8, width: int = 64, outputs: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(inputs, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, outputs),
    )


def _squared_loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch["inputs"]).squeeze(-1), batch["targets"])


def _pictures(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    """Two-dimensional points of eight clusters with the noise and the time of a diffusion."""
    which = _integers(generator, 8, size)
    angle = which * (torch.pi / 4)
    spread = 0.4 if hard else 0.1
    points = torch.stack([angle.cos(), angle.sin()], -1) * 1.5
    points = points + spread * _noise(generator, size, 2)
    noise = _noise(generator, size, 2)
    chosen = torch.rand((size, 1), generator=generator) < flip
    points = torch.where(chosen, 2 * _noise(generator, size, 2), points)
    return {"points": points, "noise": noise, "time": torch.rand((size, 1), generator=generator)}


def _diffusion_loss(model: nn.Module, batch: Batch) -> Tensor:
    angle = batch["time"] * (torch.pi / 2)
    mixed = angle.cos() * batch["points"] + angle.sin() * batch["noise"]
    inputs = torch.cat([mixed, angle.sin(), angle.cos()], -1)
    return functional.mse_loss(model(inputs), batch["noise"])


class _Speech(nn.Module):
    """An LSTM in both directions with an output for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 32, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 13)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.lstm(frames)[0]).log_softmax(-1)


def _speech(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    """Eight of twelve symbols, each heard for three frames. The hard speech is noisier."""
    symbols = 1 + _integers(generator, 12, size, 8)
    frames = _patterns(13, 12)[symbols].repeat_interleave(3, 1)
    frames = frames + (1.4 if hard else 0.9) * _noise(generator, *frames.shape)
    flipped = torch.rand(symbols.shape, generator=generator) < flip
    random = 1 + _integers(generator, 12, size, 8)
    return {"frames": frames, "labels": torch.where(flipped, random, symbols)}


def _ctc_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed loss of each row, averaged over rows, as wav2vec2 with ``sum`` does."""
    scores = model(batch["frames"]).transpose(0, 1)
    size = scores.shape[1]
    num_frames, num_labels = (
        torch.full((size,), scores.shape[0]),
        torch.full((size,), batch["labels"].shape[1]),
    )
    loss = functional.ctc_loss(scores, batch["labels"], num_frames, num_labels, reduction="sum")
    return loss / size


class _Towers(nn.Module):
    """Two encoders whose outputs are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _mlp(16, 48, 16)(), _mlp(16, 48, 16)()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one = functional.normalize(self.left(left), dim=-1)
        other = functional.normalize(self.right(right), dim=-1)
        return 10 * one @ other.T


def _pairs(generator: torch.Generator, size: int, hard: bool, flip: float) -> Batch:
    meaning = _noise(generator, size, 6)
    left, right = meaning @ _patterns(2, 6, 16)[0], meaning @ _patterns(2, 6, 16)[1]
    spread = 1.5 if hard else 0.5
    chosen = torch.rand((size, 1), generator=generator) < flip
    right = torch.where(chosen, right.roll(1, 0), right)
    return {
        "left": left + spread * _noise(generator, size, 16),
        "right": right + spread * _noise(generator, size, 16),
    }


def _contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(**batch)
    targets = torch.arange(len(scores))
    return (
        functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)
    ) / 2


TASKS: dict[str, Task] = {
    "causal_lm": Task(_gpt2, _text, _language_loss, 3e-3, vocab_size=128, small_batch=1),
    "causal_lm_tuned": Task(
        _trained, _more_chains, _language_loss, 5e-4, vocab_size=64, small_batch=1
    ),
    "causal_lm_sum": Task(_llama, _text, _summed_loss, 3e-3, vocab_size=128),
    "causal_lm_accumulated": Task(_llama, _text, _accumulated_loss, 3e-3, vocab_size=128),
    "masked_lm": Task(_bert, _masked, _labels_loss, 3e-3, 8, vocab_size=128),
    "images": Task(_vit, _images, _labels_loss, 1e-3),
    "regression": Task(_mlp(), _numbers(1.0), _squared_loss, 3e-3, 16),
    "regression_20": Task(_mlp(), _numbers(20.0), _squared_loss, 1e-2, 16),
    "diffusion": Task(_mlp(4, 64, 2), _pictures, _diffusion_loss, 3e-3, 32, small_batch=4),
    "ctc": Task(_Speech, _speech, _ctc_loss, 3e-3, 4, small_batch=1),
    "seq2seq": Task(_t5, _reversed, _labels_loss, 3e-3, 8, vocab_size=16),
    "contrastive": Task(_Towers, _pairs, _contrastive_loss, 1e-3, 16, small_batch=6),
}
