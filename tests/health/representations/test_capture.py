"""The sample of tokens that hooks take of a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from armed_meter import armed
from helpers import gpt2, token_rows
from torch import Tensor, nn

from hf_pss.health.representations import TokenSample, hidden_states


@contextmanager
def sampled(
    model: nn.Module, names: Sequence[str], *, max_tokens: int = 256, seed: int = 0
) -> Iterator[dict[str, TokenSample]]:
    samples = {name: TokenSample(max_tokens, seed) for name in names}

    def add(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = hidden_states(output)
        assert hidden is not None
        samples[name].add(hidden, torch.arange(hidden.shape[:-1].numel()))

    handles = [
        model.get_submodule(name).register_forward_hook(partial(add, name)) for name in names
    ]
    yield samples
    for handle in handles:
        handle.remove()


def batch(num_rows: int = 4) -> dict[str, Tensor]:
    rows = token_rows(num_rows)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def rows_of(tokens: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in tokens.tolist()}


class Plain(nn.Module):
    """Returns its input in the chosen form."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.block = nn.Identity()
        self.outer = _Wrap(wrap)

    def forward(self, x: Tensor) -> Tensor:
        self.outer(self.block(x))
        return x


class _Wrap(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return x if self.wrap is None else self.wrap(x)


def test_the_blocks_of_a_model_keep_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = gpt2(num_layers=2).eval()
    names = ["transformer.h.0", "transformer.h.1"]
    with sampled(model, names, max_tokens=10) as samples:
        hidden = model(**batch(), output_hidden_states=True).hidden_states
    assert [sample.num_seen for sample in samples.values()] == [48, 48]
    first = samples["transformer.h.0"].rows
    assert first.shape == (10, 16)
    assert not first.requires_grad
    everything = hidden[1].detach().reshape(-1, 16)
    places = [int((everything == row).all(dim=-1).nonzero()[0]) for row in first]
    assert len(set(places)) == 10
    # The last block's output passes the final norm before it becomes a hidden state.
    with sampled(model, names, max_tokens=48) as every_sample:
        model(**batch())
    order = rows_of(every_sample["transformer.h.1"].rows)
    assert rows_of(samples["transformer.h.1"].rows) <= order
    final = model.transformer.ln_f(samples["transformer.h.1"].rows).detach()
    assert torch.allclose(final, hidden[2].detach().reshape(-1, 16)[places], atol=1e-6)


def test_the_sample_is_uniform_over_several_passes() -> None:
    """Every token of three passes of different lengths is kept equally often."""
    model = Plain()
    parts = torch.arange(30.0).view(30, 1).split([4, 20, 6])
    counts = torch.zeros(30)
    num_runs = 1500
    for seed in range(num_runs):
        with sampled(model, ["block"], max_tokens=10, seed=seed) as samples:
            for part in parts:
                model(part)
        kept = samples["block"].rows.flatten().long()
        assert len(set(kept.tolist())) == 10
        counts[kept] += 1
    assert samples["block"].num_seen == 30
    # Binomial standard deviation of the share; the worst of thirty is 3.3 of them.
    deviation = (1 / 3 * 2 / 3 / num_runs) ** 0.5
    assert float((counts / num_runs - 1 / 3).abs().max()) <= 4.5 * deviation


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, x = Plain(), torch.randn(50, 3)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        with sampled(model, ["block"], max_tokens=5, seed=seed) as samples:
            model(x)
        found.append(samples["block"].rows)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrap", [None, lambda x: (x, "cache"), lambda x: {"last": x}, lambda x: [x]]
)
def test_forms_of_output(wrap: Any) -> None:
    model = Plain(wrap)
    with sampled(model, ["outer"]) as samples:
        model(torch.ones(3, 2, dtype=torch.bfloat16))
    assert samples["outer"].rows.dtype == torch.float32
    assert samples["outer"].rows.tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("output", [None, (), "text", torch.ones(3, 2).long()], ids=repr)
def test_outputs_without_hidden_states_are_a_warning(
    output: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert hidden_states(output) is None
    model = gpt2()
    meter, _ = armed(model)
    block = model.transformer.h[0]
    with caplog.at_level(logging.WARNING, "hf_pss"):
        meter._see_tokens("transformer.h.0", block, (), output)
    assert "transformer.h.0 returns no hidden states" in caplog.text
    assert meter._samples["transformer.h.0"].rows.shape == (0, 0)
    meter.disarm()
