"""The sample of tokens that hooks take of a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import gpt2, token_rows
from torch import Tensor, nn

from hf_pss.health.capture import Capture


@contextmanager
def capture(
    model: nn.Module, names: Sequence[str], *, max_tokens: int = 256, seed: int = 0
) -> Iterator[Capture]:
    def every_token(name: str, hidden: Tensor) -> Tensor:
        return torch.arange(hidden.shape[:-1].numel())

    captured = Capture(names, max_tokens=max_tokens, seed=seed, choose=every_token)
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: captured.add(name, output)
        )
        for name in names
    ]
    yield captured
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
    with capture(model, names, max_tokens=10) as captured:
        hidden = model(**batch(), output_hidden_states=True).hidden_states
    assert captured.num_seen == dict.fromkeys(names, 48)
    first = captured.samples["transformer.h.0"]
    assert first.shape == (10, 16)
    assert not first.requires_grad
    everything = hidden[1].detach().reshape(-1, 16)
    places = [int((everything == row).all(dim=-1).nonzero()[0]) for row in first]
    assert len(set(places)) == 10
    # The last block's output passes the final norm before it becomes a hidden state.
    with capture(model, names, max_tokens=48) as all_captured:
        model(**batch())
    order = rows_of(all_captured.samples["transformer.h.1"])
    assert rows_of(captured.samples["transformer.h.1"]) <= order
    final = model.transformer.ln_f(captured.samples["transformer.h.1"]).detach()
    assert torch.allclose(final, hidden[2].detach().reshape(-1, 16)[places], atol=1e-6)


def test_the_sample_is_uniform_over_several_passes() -> None:
    """Every token of three passes of different lengths is kept equally often."""
    model = Plain()
    parts = torch.arange(30.0).view(30, 1).split([4, 20, 6])
    counts = torch.zeros(30)
    num_runs = 1500
    for seed in range(num_runs):
        with capture(model, ["block"], max_tokens=10, seed=seed) as captured:
            for part in parts:
                model(part)
        kept = captured.samples["block"].flatten().long()
        assert len(set(kept.tolist())) == 10
        counts[kept] += 1
    assert captured.num_seen == {"block": 30}
    # Binomial standard deviation of the share; the worst of thirty is 3.3 of them.
    deviation = (1 / 3 * 2 / 3 / num_runs) ** 0.5
    assert float((counts / num_runs - 1 / 3).abs().max()) <= 4.5 * deviation


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, x = Plain(), torch.randn(50, 3)
    state = torch.get_rng_state()
    samples = []
    for seed in (0, 0, 1):
        with capture(model, ["block"], max_tokens=5, seed=seed) as captured:
            model(x)
        samples.append(captured.samples["block"])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrap", [None, lambda x: (x, "cache"), lambda x: {"last": x}, lambda x: [x]]
)
def test_forms_of_output(wrap: Any) -> None:
    model = Plain(wrap)
    with capture(model, ["outer"]) as captured:
        model(torch.ones(3, 2, dtype=torch.bfloat16))
    assert captured.samples["outer"].dtype == torch.float32
    assert captured.samples["outer"].tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize(
    "wrap", [lambda x: None, lambda x: (), lambda x: "text", lambda x: x.long()]
)
def test_outputs_without_hidden_states_are_a_warning(
    wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Plain(wrap)
    with caplog.at_level(logging.WARNING, "hf_pss"), capture(model, ["outer"]) as captured:
        model(torch.ones(3, 2))
    assert "outer returns no hidden states" in caplog.text
    assert captured.samples["outer"].shape == (0, 0)
