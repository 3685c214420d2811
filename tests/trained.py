"""A small network that behaves as a pretrained one does: its leading directions are knowledge."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 96
LENGTH = 32
_STEPS = 250


def language(seed: int, num_rows: int, *, noise: float = 0.1) -> Tensor:
    """Return rows of a made-up language, (num_rows, LENGTH): two tokens decide the next.

    Languages share a table of successors; each replaces a third of it by its own.
    """
    table = torch.randint(VOCABULARY, (VOCABULARY, 8), generator=_generator(99))
    own = torch.randint(VOCABULARY, (VOCABULARY, 8), generator=_generator(seed))
    table = torch.where(torch.rand(table.shape, generator=_generator(seed + 1)) < 0.3, own, table)
    generator = _generator(seed + 2)
    rows = torch.randint(VOCABULARY, (num_rows, LENGTH), generator=generator)
    is_noise = torch.rand(rows.shape, generator=generator) < noise
    for at in range(2, LENGTH):
        following = table[rows[:, at - 1], rows[:, at - 2] % 8]
        rows[:, at] = torch.where(is_noise[:, at], rows[:, at], following)
    return rows


def odd_row() -> Tensor:
    """Return a row that makes the gradient jump: one rare token all over."""
    return torch.full((LENGTH,), VOCABULARY - 1)


def trained_gpt2() -> GPT2LMHeadModel:
    """Return a fresh copy of a GPT-2 that was trained once in this process, for some seconds."""
    return copy.deepcopy(_trained())


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: Tensor) -> float:
    model.eval()
    loss: float = model(input_ids=rows, labels=rows).loss.item()
    return loss


@cache
def _trained() -> GPT2LMHeadModel:
    rows = language(0, 4096)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=2,
                n_embd=64,
                n_head=4,
                n_positions=LENGTH,
                vocab_size=VOCABULARY,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_STEPS)
        model.train()
        for step in range(_STEPS):
            batch = rows[16 * step % 4096 :][:16]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
