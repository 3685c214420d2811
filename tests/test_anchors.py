"""Smoothing goes no further than what a matrix had when it was last healthy."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pss.errors import StateError
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Anchored, Clip, smooth_spectrum
from hf_pss.models.anchors import NUM_RECORDED, Anchors, leading_values

GROWTH = 1.05  # of `Anchored`: the allowed growth
ROUNDING = 1e-5  # relative to σ₁


def matrix(seed: int, m: int = 40, n: int = 24, *, power: float = 0.6) -> Tensor:
    """Return a matrix with σ_i = i^-power."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    sigma = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    return ((u * sigma) @ v.mT).float()


def record_of(weight: Tensor) -> Tensor:
    return leading_values(weight[None])[0]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (6, 4), (1, 8), (300, 200)])
@pytest.mark.parametrize("name", SMOOTHING_FUNCTIONS)
def test_a_matrix_as_it_was_is_left_alone(name: str, shape: tuple[int, int]) -> None:
    weight = matrix(0, max(shape), min(shape))
    weight = weight if shape[0] >= shape[1] else weight.mT.contiguous()
    phi = Anchored(SMOOTHING_FUNCTIONS[name](), record_of(weight))
    assert torch.equal(smooth_spectrum(weight, phi).weight, weight)
    # Without the anchor most of them move it.
    moved = not torch.equal(smooth_spectrum(weight, phi.phi).weight, weight)
    assert moved or name == "stable_rank_cap" or min(shape) == 1


@pytest.mark.parametrize("name", ["clip", "log", "softplus", "hammer", "convolution", "softmax"])
def test_growth_is_cut_back_and_no_further(name: str) -> None:
    healthy = matrix(0)
    u, s, vh = torch.linalg.svd(healthy.double(), full_matrices=False)
    grown = s.clone()
    grown[0] *= 6.0
    weight = ((u * grown) @ vh).float()
    phi = Anchored(SMOOTHING_FUNCTIONS[name](), record_of(healthy))
    after = torch.linalg.svdvals(smooth_spectrum(weight, phi).weight.double())
    plain = torch.linalg.svdvals(smooth_spectrum(weight, phi.phi).weight.double())
    level = GROWTH * float(s[0])
    assert float(after[0]) == pytest.approx(max(level, float(plain[0])), rel=ROUNDING)
    assert float(after[0]) < 0.9 * float(grown[0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.sampled_from(sorted(SMOOTHING_FUNCTIONS)))
def test_no_value_passes_its_record_and_the_order_stays(
    seed: int, factor: float, name: str
) -> None:
    weight, healthy = matrix(seed, 12, 10), matrix(seed + 1, 12, 10, power=0.3) * factor
    record = record_of(healthy)
    smoothed = smooth_spectrum(weight, Anchored(SMOOTHING_FUNCTIONS[name](), record))
    before, after = smoothed.sigma_before, smoothed.sigma_after
    recorded = record[: min(NUM_RECORDED, len(after))]
    head = after[: len(recorded)]
    slack = ROUNDING * float(before[0])
    lowered = head < before[: len(recorded)]
    assert bool((head >= torch.minimum(before[: len(recorded)], GROWTH * recorded) - slack).all())
    assert bool(
        (head[~lowered] <= torch.maximum(before[: len(recorded)], recorded)[~lowered] + slack).all()
    )
    assert bool((after[:-1] >= after[1:] - slack).all())


def test_without_a_record_nothing_moves() -> None:
    weight = matrix(0)
    for record in (torch.zeros(NUM_RECORDED), torch.full((NUM_RECORDED,), math.nan)):
        assert torch.equal(smooth_spectrum(weight, Anchored(Clip(), record)).weight, weight)


def test_the_record_follows_a_healthy_run_and_stops_at_trouble() -> None:
    anchors = Anchors({"w": [1.0]})
    for step in range(1, 401):
        if step == 170:
            anchors.note_trouble(step)
        if anchors.is_due(step):
            anchors.update(step, {"w": [float(step)]})
        if step in (149, 199, 249, 299):
            # At 200 the candidate of 150 has seen the trouble, and is dropped.
            assert anchors.healthy["w"][0] == {149: 50, 199: 100, 249: 100, 299: 200}[step], step
    assert anchors.healthy["w"] == [350.0]


def test_state_is_strict_json_and_comes_back_exactly() -> None:
    anchors = Anchors({"a": [0.1 + 0.2, 1e-30], "b": []})
    anchors.note_trouble(7)
    anchors.update(50, {"a": [3.0], "b": [math.pi]})
    state = json.loads(json.dumps(anchors.state_dict(), allow_nan=False))
    loaded = Anchors.from_state_dict(state, ["a", "b"])
    assert loaded.state_dict() == anchors.state_dict()
    assert torch.equal(loaded.levels(["b", "a"]), anchors.levels(["b", "a"]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("healthy"),
        lambda state: state.update(candidate={"a": [1.0]}),
        lambda state: state.update(candidate_step=-1),
        lambda state: state["healthy"].update(a=["x"]),
        lambda state: state["healthy"].update(a=[-1.0]),
        lambda state: state["healthy"].update(a=None),
    ],
)
def test_a_damaged_state_is_refused(damage: object) -> None:
    state = Anchors({"a": [1.0], "b": [2.0]}).state_dict()
    assert callable(damage)
    damage(state)
    with pytest.raises(StateError):
        Anchors.from_state_dict(state, ["a", "b"])


def test_levels_of_small_and_unknown_matrices() -> None:
    levels = Anchors({"small": [3.0, 2.0], "broken": []}).levels(["small", "broken", "new"])
    assert levels.tolist() == [
        [3.0, 2.0] + [2.0] * (NUM_RECORDED - 2),
        [0.0] * NUM_RECORDED,
        [0.0] * NUM_RECORDED,
    ]
