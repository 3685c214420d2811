"""The record of a floor is true: exact stable ranks right after it acted, by float64 SVDs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_pss import PSSConfig, PSSController
from hf_pss.linalg import noise_stable_rank, quick_stable_rank
from hf_pss.linalg.smoothing import floors_at, looks_trained, starting_ranks
from hf_pss.models.selection import named_parameters_canonical

# True over recorded stable rank, the least of all matrices.
TRUE_OVER_RECORDED = 0.98
# And how far a reading on trained matrices is above the true stable rank; 1.006 on SmolLM2-135M.
READING = 1.02
VOCABULARY = 256


def build(kind: str, width: int) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = 4
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=2,
                n_embd=width,
                n_head=heads,
                n_positions=32,
                vocab_size=VOCABULARY,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 32,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=2 * width))
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=4 * width))


def train_(model: PreTrainedModel, num_steps: int) -> None:
    """Train too fast: stable ranks fall, and spectra become those of trained matrices."""
    generator = torch.Generator().manual_seed(1)
    common = torch.arange(1, VOCABULARY + 1).float().reciprocal()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        rows = torch.multinomial(common, 8 * 32, replacement=True, generator=generator).view(8, 32)
        rows = rows.cumsum(1) % VOCABULARY
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def spectra(pss: PSSController, model: PreTrainedModel) -> dict[str, Tensor]:
    parameters = named_parameters_canonical(model)
    return {
        view.name: torch.linalg.svdvals(view.read(parameters[view.parameter_name]).double())
        for view in pss.selection.matrices
    }


def rank_of(sigma: Tensor) -> float:
    return float(sigma.square().sum() / sigma[0].square())


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("llama", 64),
        ("gpt2", 48),
        ("bert", 160),
        *(
            pytest.param(kind, width, marks=pytest.mark.slow)
            for width in (96, 256, 512, 1024)
            for kind in ("llama", "gpt2", "bert")
        ),
    ],
)
def test_recorded_stable_ranks_match_the_matrices(kind: str, width: int) -> None:
    model = build(kind, width)
    pss = PSSController(model, PSSConfig.preset("floor"))
    train_(model, 25)
    before = spectra(pss, model)
    readings = pss.stable_ranks()
    assert max(readings[name] / rank_of(sigma) for name, sigma in before.items()) < READING
    record = pss.smooth_now()
    after = spectra(pss, model)
    moved = [c for c in record.matrices if c.status in ("smoothed", "truncated")]
    assert len(moved) > 4, "training was to leave something to do"
    for change in moved:
        sigma = after[change.name]
        assert change.stable_rank_after is not None
        assert change.sigma_after is not None
        assert rank_of(sigma) >= TRUE_OVER_RECORDED * change.stable_rank_after, change.name
        assert float(sigma[0]) <= change.sigma_after / TRUE_OVER_RECORDED
        # It could have failed: the floor had something to lift.
        assert rank_of(before[change.name]) < change.stable_rank_after
        # A small matrix is brought all the way up.
        if change.status == "smoothed" and min(change.shape) <= 128:
            floor = pss._triggers.floors[change.name]
            assert rank_of(sigma) == pytest.approx(floor, rel=1e-3)


def test_trained_weights_have_half_their_own_stable_rank_as_a_floor() -> None:
    shapes = {"a": (64, 64), "b": (64, 256), "new": (64, 64)}
    noise = {name: noise_stable_rank(*shape) for name, shape in shapes.items()}
    fresh = {name: 1.05 * rank for name, rank in noise.items()}
    trained = {"a": 4.0, "b": 9.0, "new": noise["new"]}
    assert not looks_trained(shapes, fresh)
    assert looks_trained(shapes, trained)
    assert floors_at(1.0, shapes, starting_ranks(shapes, fresh)) == noise
    assert floors_at(1.0, shapes, starting_ranks(shapes, trained)) == {
        "a": 2.0,
        "b": 4.5,
        "new": noise["new"] / 2,
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_fresh_weights_do_not_look_trained_and_trained_ones_do(kind: str) -> None:
    model = build(kind, 64)
    pss = PSSController(model, PSSConfig.preset("floor"))
    shapes = pss._measurements.shapes
    assert not looks_trained(shapes, pss.stable_ranks())
    train_(model, 60)
    assert looks_trained(shapes, pss.stable_ranks())


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (300, 300), (768, 256)])
def test_a_reading_of_a_power_law_is_within_its_band(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    u = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator)).Q
    for power in (0.2, 0.5, 1.0):
        sigma = torch.arange(1, min(m, n) + 1).float() ** -power
        reading = float(quick_stable_rank((u * sigma) @ v.mT))
        assert 0.999 < reading / rank_of(sigma.double()) < READING


def test_a_doubtful_matrix_is_read_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    pss = PSSController(build("gpt2", 48), PSSConfig.preset("floor"))
    measurements = pss._measurements
    measurements.follow()
    ranks = measurements.followed_stable_ranks({})
    name, read = next(iter(ranks)), []

    def counted(stack: Tensor) -> Tensor:
        read.append(len(stack))
        return quick_stable_rank(stack)

    monkeypatch.setattr("hf_pss.models.measurements.quick_stable_rank", counted)
    monkeypatch.setattr("hf_pss.models.tracked.TrackedSpectrum.is_doubtful", lambda one, f: f > 0)
    found = measurements.followed_stable_ranks({name: 1.0})
    assert read == [1]
    assert found == pytest.approx(ranks, rel=1e-4)
