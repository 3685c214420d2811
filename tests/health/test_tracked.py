"""The tracked spectra against float64 decompositions, with drift, jumps and broken numbers."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
import torch
from helpers import gpt2, llama
from torch import Tensor, nn

from hf_pss.errors import StateError
from hf_pss.linalg.subspace_rounds import ritz_round
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.models.tracked import SpectrumTracker, TrackedSpectrum

BACKEND = Backend()
# Vectors are rounded to bfloat16 between refreshes.
COLD_TOLERANCE = 3e-6  # 1.5e-6
# Noise that moves by 1 % of its norm a step, 50 steps: the residual's bound is 1 %, too.
DRIFT_TOLERANCE = 0.01
FROBENIUS_TOLERANCE = 1e-6
UP = "transformer.h.0.mlp.c_fc.weight"


def model_of() -> tuple[tuple[MatrixView, ...], dict[str, nn.Parameter]]:
    torch.manual_seed(2)
    model = gpt2(num_layers=2)
    return select_matrices(model).matrices, named_parameters_canonical(model)


def exact(view: MatrixView, parameters: dict[str, nn.Parameter]) -> tuple[float, float]:
    """Return σ₁ and ‖W‖_F."""
    sigmas = torch.linalg.svdvals(view.read(parameters[view.parameter_name]).double())
    return float(sigmas[0]), float(sigmas.norm())


def check(
    found: dict[str, TrackedSpectrum],
    views: tuple[MatrixView, ...],
    parameters: dict[str, nn.Parameter],
    tolerance: float,
) -> float:
    """Return the worst error of σ₁, and check that of the norm."""
    assert list(found) == [view.name for view in views]
    worst = 0.0
    for view in views:
        sigma, norm = exact(view, parameters)
        one = found[view.name]
        assert one.frobenius == pytest.approx(norm, rel=FROBENIUS_TOLERANCE)
        assert one.sigma <= sigma * (1 + FROBENIUS_TOLERANCE)
        assert one.sigma == pytest.approx(sigma, rel=tolerance)
        assert one.stable_rank == pytest.approx((norm / sigma) ** 2, rel=2.5 * tolerance)
        worst = max(worst, 1 - one.sigma / sigma)
    return worst


@pytest.mark.parametrize("batched", [False, True])
def test_the_first_refresh_is_close(batched: bool) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND, batched=batched)
    check(tracker.measure(parameters), views, parameters, COLD_TOLERANCE)


@pytest.mark.parametrize("batched", [False, True])
def test_it_follows_fifty_steps_of_drift(batched: bool) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND, batched=batched)
    tracker.refresh(parameters)
    torch.manual_seed(0)
    pushes = {name: torch.randn_like(p) for name, p in parameters.items()}
    for _ in range(50):
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(pushes[name], alpha=float(0.01 * p.norm() / pushes[name].norm()))
        tracker.refresh(parameters)
    check(tracker.read(parameters), views, parameters, DRIFT_TOLERANCE)


def test_both_ways_of_multiplying_agree() -> None:
    views, parameters = model_of()
    one, other = (
        SpectrumTracker(views, BACKEND, batched=b).measure(parameters) for b in (False, True)
    )
    for view in views:
        assert one[view.name].sigma == pytest.approx(other[view.name].sigma, rel=COLD_TOLERANCE)


def test_a_second_direction_that_overtakes_is_found() -> None:
    """One vector alone would miss the new leader, which is orthogonal to the old one."""
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND)
    with torch.no_grad():
        parameters[UP].zero_()
        parameters[UP][0, 0], parameters[UP][1, 1] = 2.0, 1.0
    tracker.measure(parameters)
    with torch.no_grad():
        parameters[UP][1, 1] = 5.0
    assert tracker.measure(parameters)[UP].sigma == pytest.approx(5.0, rel=COLD_TOLERANCE)


def test_a_stale_estimate_is_marked_and_recovers() -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND, batched=True)
    tracker.measure(parameters)
    torch.manual_seed(0)
    vectors = tracker._groups[0].vectors.clone()
    image = torch.randn_like(vectors)
    _, found = ritz_round(vectors, image, torch.full((len(vectors),), 9.0))
    assert all(TrackedSpectrum(*row).is_stale for row in found.tolist())
    with torch.no_grad():
        parameters[UP].add_(10 * torch.outer(torch.randn(16), torch.randn(64)))
    for _ in range(3):
        found_again = tracker.measure(parameters)
    assert not found_again[UP].is_stale
    check({UP: found_again[UP]}, tuple(v for v in views if v.name == UP), parameters, 1e-5)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_breaks_harms_no_other_and_heals(bad: float, batched: bool) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND, batched=batched)
    healthy = parameters[UP].detach().clone()
    with torch.no_grad():
        parameters[UP][0, 0] = bad  # from the first, cold refresh on
    for _ in range(2):
        broken = tracker.measure(parameters)
        assert math.isnan(broken[UP].sigma)
        assert math.isnan(broken[UP].stable_rank)
        assert broken[UP].is_stale
        others = tuple(view for view in views if view.name != UP)
        rest = {name: one for name, one in broken.items() if name != UP}
        check(rest, others, parameters, COLD_TOLERANCE)
    with torch.no_grad():
        parameters[UP].copy_(healthy)
    for _ in range(40):
        healed = tracker.measure(parameters)
    check({UP: healed[UP]}, tuple(v for v in views if v.name == UP), parameters, DRIFT_TOLERANCE)


def test_zero_is_zero() -> None:
    views, parameters = model_of()
    with torch.no_grad():
        parameters[UP].zero_()
    tracker = SpectrumTracker(views, BACKEND)
    for _ in range(2):
        found = tracker.measure(parameters)[UP]
        assert (found.sigma, found.frobenius, found.stable_rank) == (0.0, 0.0, 0.0)
        assert not found.is_stale


class Counted(Backend):
    """Records the number of values in each read from the device."""

    reads: ClassVar[list[int]] = []

    def agree(self, values: Tensor) -> list[float]:
        self.reads.append(len(values))
        return Backend.agree(self, values)


@pytest.mark.parametrize(("entry", "num_reads"), [(math.nan, 1), (0.0, 2)])
def test_broken_and_zero_matrices_cost_few_reads(entry: float, num_reads: int) -> None:
    views, parameters = model_of()
    with torch.no_grad():
        parameters[UP].fill_(entry)
    backend = Counted()
    tracker = SpectrumTracker(views, backend)
    for _ in range(2):
        backend.reads.clear()
        tracker.measure(parameters)
        assert len(backend.reads) == num_reads


@pytest.mark.parametrize("make", [gpt2, llama])
def test_directions_of_broken_and_zero_matrices_are_nan_and_zero(make: type) -> None:
    """In one orientation the tracker follows v₁, in the other v₁ needs one product."""
    model = make()
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    broken, zero, *rest = {view.parameter_name: view for view in views}.values()
    with torch.no_grad():
        parameters[broken.parameter_name].fill_(math.nan)
        parameters[zero.parameter_name].zero_()
    tracker = SpectrumTracker(views, BACKEND)
    tracker.measure(parameters)
    found = tracker.directions(parameters)
    assert found[broken.name].isnan().all()
    assert not found[zero.name].any()
    assert [float(found[view.name].norm()) for view in rest] == pytest.approx([1.0] * len(rest))


def test_single_rows_and_broken_matrices_start_cold_and_recover() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 4))
    views = select_matrices(model, include=("weight",)).matrices
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["0.weight"][0, 0] = math.nan
        parameters["3.weight"].zero_()
    tracker = SpectrumTracker(views, Backend())
    found = tracker.measure(parameters)
    assert math.isnan(found["0.weight"].sigma)
    assert found["3.weight"].sigma == 0
    assert found["1.weight"].sigma == pytest.approx(parameters["1.weight"].norm().item())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    for _ in range(4):
        found = tracker.measure(parameters)
    for name, one in found.items():
        exact = torch.linalg.svdvals(parameters[name].detach())[0].item()
        assert one.sigma == pytest.approx(exact, rel=1e-2)


def test_a_failed_cold_start_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND)

    def fail(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            tracker.refresh(parameters)
        assert tracker.read(parameters) == {}
    check(tracker.measure(parameters), views, parameters, COLD_TOLERANCE)


def test_a_cold_start_holds_some_spaces_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    views, parameters = model_of()
    sizes = []
    decompose = torch.linalg.eigh

    def counted(core: Tensor) -> Any:
        sizes.append(len(core))
        return decompose(core)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    monkeypatch.setattr("hf_pss.models.tracked._MAX_ELEMENTS", 68 * 16 * 3)
    monkeypatch.setattr("hf_pss.models.tracked._SMALL_ELEMENTS", 0)
    check(SpectrumTracker(views, BACKEND).measure(parameters), views, parameters, COLD_TOLERANCE)
    assert sum(sizes) == len(views)
    assert max(sizes) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_refresh_but_the_first_makes_the_host_wait() -> None:
    views, parameters = model_of()
    on_device = {name: nn.Parameter(p.detach().cuda()) for name, p in parameters.items()}
    tracker = SpectrumTracker(views, BACKEND)
    tracker.measure(on_device)
    with torch.no_grad():  # noise: some are to have more rounds
        on_device[UP].normal_()
    tracker.measure(on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            tracker.refresh(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_extreme_entries_are_measured_scaled(scale: float) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND)
    tracker.measure(parameters)
    with torch.no_grad():
        parameters[UP].mul_(scale)
    for _ in range(2):
        found = tracker.measure(parameters)
        check({UP: found[UP]}, tuple(v for v in views if v.name == UP), parameters, 1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_bfloat16_is_multiplied_as_float32(batched: bool) -> None:
    views, parameters = model_of()
    halves = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters.items()}
    found = SpectrumTracker(views, BACKEND, batched=batched).measure(halves)
    check(found, views, halves, COLD_TOLERANCE)


def moved_(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=1e-3)


@pytest.mark.parametrize("batched", [None, False, True])
def test_a_saved_state_continues_with_the_same_bits(batched: bool | None) -> None:
    views, parameters = model_of()
    tracker, again = (SpectrumTracker(views, BACKEND, batched=batched) for _ in range(2))
    assert tracker.state() is None
    tracker.measure(parameters)
    moved_(parameters, 0)
    tracker.refresh(parameters)
    state = json.loads(json.dumps(tracker.state(), allow_nan=False))
    again.restore(again.parsed(state, parameters))
    assert again.state() == tracker.state()
    moved_(parameters, 1)
    found = tracker.measure(parameters)
    assert again.measure(parameters) == found
    cold = SpectrumTracker(views, BACKEND, batched=batched)
    assert cold.measure(parameters) != found  # so the state matters


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: {**state, "other": state[UP]},
        lambda state: {**state, UP: 3},
        lambda state: {**state, UP: state[UP][:-4]},
        lambda state: {**state, UP: "ä"},
        lambda state: {**state, UP: state[UP][:-8] + "f39/f39/"},  # NaN in bfloat16
        lambda state: [],
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Any) -> None:
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND)
    tracker.refresh(parameters)
    before = tracker.state()
    with pytest.raises(StateError):
        tracker.parsed(damage(before), parameters)
    assert tracker.state() == before


def test_small_matrices_of_different_shapes_share_a_group_and_are_followed() -> None:
    """GPT-2 of width 16 has matrices with 16 and with 64 columns."""
    views, parameters = model_of()
    tracker = SpectrumTracker(views, BACKEND)
    for seed in range(5):
        found = tracker.measure(parameters)
        check(found, views, parameters, DRIFT_TOLERANCE)
        moved_(parameters, seed)
    assert [group.is_stacked for group in tracker._groups] == [True]


def test_only_a_value_whose_error_may_reach_below_the_floor_is_doubtful() -> None:
    one = TrackedSpectrum(sigma=1.0, frobenius=2.0, residual=0.1)  # a stable rank of 4
    assert [one.is_doubtful(floor) for floor in (3.6, 3.7, 4.0, 4.1)] == [False, True, True, False]
    broken = TrackedSpectrum(sigma=math.nan, frobenius=math.nan, residual=math.nan)
    assert not broken.is_doubtful(4.0)


def test_no_matrix_gives_no_numbers() -> None:
    tracker = SpectrumTracker((), BACKEND)
    assert tracker.measure({}) == {}


def test_two_vectors_are_kept_orthonormal_when_the_rank_is_one() -> None:
    column: Tensor = torch.zeros(1, 2, 5)
    column[0, :, 0] = torch.tensor([1.0, 1.0])  # both vectors are mapped to one direction
    vectors, _ = ritz_round(torch.eye(5)[None, :2], column, torch.ones(1))
    gram = vectors[0] @ vectors[0].mT
    assert torch.allclose(gram, torch.eye(2), atol=FROBENIUS_TOLERANCE)
