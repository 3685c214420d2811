"""AMUSE against its slow reference, against Schedule-Free AdamW, and what smoothing does to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import differences, gpt2
from optim.reference_twins.amuse import ReferenceAmuse
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss import PSSConfig, PSSController
from hf_pss.errors import ConfigurationError
from hf_pss.linalg import newton_schulz
from hf_pss.models.smoother import is_schedule_free
from hf_pss.optim import build_optimizer
from hf_pss.optim.amuse import Amuse, interpolation
from hf_pss.optim.rules import UPDATE_SCALES

NUM_STEPS, WARMUP, LR = 50, 10, 0.02
SHAPE = (24, 16)
# Largest entry of the difference from the float64 reference, weights of about 1; 3.9e-6 measured.
TOLERANCE = 1e-5
# The same, from Schedule-Free AdamW in float64; 1.2e-15 measured.
ADAMW = 3e-15
# Of x or y found again from the other and z, in float32; 2.4e-7 measured.
ROUND_TRIP = 6e-7
# Of what x and z were changed by, from the edit of the weights, relative to it; 2.1e-7 measured.
SAME_EDIT = 6e-7

WAYS: dict[str, dict[str, Any]] = {
    "paper": {"beta1": 0.9, "warmup_steps": WARMUP},
    "their program": {"beta1": 0.6, "rho": 0.8, "warmup_steps": WARMUP},
    "constant": {"beta1": 0.9},
    "decay": {"beta1": 0.9, "warmup_steps": WARMUP, "weight_decay": 0.1},
    "plain momentum": {"beta1": 0.9, "warmup_steps": WARMUP, "nesterov": False},
    "average": {"beta1": 1.0},
}


def rate(step: int) -> float:
    return LR * min(1.0, (step + 1) / WARMUP)


def set_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def quadratic() -> tuple[nn.Parameter, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(*SHAPE, generator=generator))
    a = torch.randn(SHAPE[0], SHAPE[0], generator=generator, dtype=torch.float64) / 5
    goal = torch.randn(*SHAPE, generator=generator, dtype=torch.float64)
    return weight, a, goal


def direction(update: Tensor) -> Tensor:
    """Return Muon's direction in float64; these tests are about its use by AMUSE."""
    factor = newton_schulz(update.unsqueeze(0), schedule="polar_express_4", dtype=torch.float64)[0]
    return UPDATE_SCALES["rms_match"](*SHAPE) * factor


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_reference(way: str) -> None:
    options = {"weight_decay": 0.0, **WAYS[way]}
    weight, a, goal = quadratic()
    start = weight.detach().double()
    slow = ReferenceAmuse(start, start, direction, **options)
    optimizer = Amuse([{"params": [weight], "algo": "muon", "dtype": "float32"}], **options)
    for step in range(NUM_STEPS):
        set_rate(optimizer, rate(step))
        y = slow.gradient_point()
        assert largest(weight, y) <= TOLERANCE
        weight.grad = (a.T @ (a @ (weight.detach().double() - goal))).float()
        slow.step(a.T @ (a @ (y - goal)), rate(step))
        optimizer.step()
    optimizer.eval()
    assert largest(weight, slow.x) <= TOLERANCE
    assert largest(optimizer.state[weight]["z"], slow.z) <= TOLERANCE
    assert largest(slow.x, slow.z) > 1000 * TOLERANCE  # they differ


def largest(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


def test_the_rest_is_schedule_free_adamw() -> None:
    package = pytest.importorskip("schedulefree")
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    goal = torch.randn(30, generator=generator, dtype=torch.float64)
    optimizer = Amuse([{"params": [ours]}], weight_decay=0.0, betas=(0.9, 0.95))
    expected = package.AdamWScheduleFree([theirs], LR, (0.9, 0.95), warmup_steps=WARMUP)
    expected.train()
    for step in range(NUM_STEPS):
        set_rate(optimizer, rate(step))
        for p in (ours, theirs):
            p.grad = (p.detach() - goal) ** 3
        optimizer.step()
        expected.step()
        assert largest(ours, theirs) <= ADAMW
    optimizer.eval()
    expected.eval()
    assert largest(ours, theirs) <= ADAMW


def test_interpolation_starts_at_beta_and_tends_to_the_average() -> None:
    way = {"beta1": 0.9, "rho": 1.0, "warmup_steps": 5}
    assert {interpolation(t, **way) for t in range(1, 6)} == {0.9}
    later = [interpolation(t, **way) for t in (5, 6, 50, 5000)]
    assert later == sorted(later)
    assert 0.9999 < later[-1] < 1
    assert interpolation(5000, beta1=0.9, rho=0.0, warmup_steps=5) == pytest.approx(0.9)
    assert interpolation(5000, beta1=0.9, rho=1.0, warmup_steps=0) == 0.9


# ---- modes ----


def run(num_steps: int, *, dtype: torch.dtype = torch.float32) -> tuple[Amuse, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 4), (4, 6), (5,)]
    parameters = [nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in shapes]
    groups = [{"params": parameters[:2], "algo": "muon"}, {"params": parameters[2:]}]
    optimizer = Amuse(groups, lr=LR, beta1=0.8, warmup_steps=3)
    go_on(optimizer, parameters, num_steps)
    return optimizer, parameters


def go_on(optimizer: Amuse, parameters: list[nn.Parameter], num_steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(num_steps):
        for p in parameters:
            p.grad = p.detach() - torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def test_switching_twice_is_switching_once() -> None:
    optimizer, parameters = run(8)
    y = values(parameters)
    optimizer.train()
    assert not list(differences(y, values(parameters)))
    optimizer.eval()
    x = values(parameters)
    optimizer.eval()
    assert not list(differences(x, values(parameters)))
    assert largest(x[0], y[0]) > 1000 * ROUND_TRIP
    optimizer.train()
    assert max(largest(a, b) for a, b in zip(y, parameters, strict=True)) <= ROUND_TRIP


def test_before_the_first_step_x_y_and_z_are_equal() -> None:
    optimizer, parameters = run(0)
    start = values(parameters)
    optimizer.eval()
    optimizer.train()
    assert not list(differences(start, values(parameters)))


def test_a_step_on_the_average_is_refused() -> None:
    optimizer, parameters = run(2)
    optimizer.eval()
    before = values(parameters)
    with pytest.raises(ConfigurationError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    assert not list(differences(before, values(parameters)))


def test_the_mode_is_saved_and_a_resume_continues_exactly() -> None:
    optimizer, parameters = run(8)
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    x = values(parameters)
    other, twins = run(0)
    for twin, value in zip(twins, x, strict=True):
        twin.data.copy_(value)
    other.load_state_dict(saved)
    for each, own in ((optimizer, parameters), (other, twins)):
        each.train()
        go_on(each, own, 5)
    assert not list(differences(values(parameters), values(twins)))
    assert not list(differences(optimizer.state_dict(), other.state_dict()))


def test_the_average_is_of_every_z() -> None:
    """At a constant rate c is 1/t: x is the mean of z₁ … z_t, the start not among them."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Amuse([{"params": [weight]}], lr=LR, weight_decay=0.0)
    seen = []
    for step in range(6):
        weight.grad = torch.full_like(weight, 1.0 + step)
        optimizer.step()
        seen.append(optimizer.state[weight]["z"].clone())
    optimizer.eval()
    assert largest(weight, torch.stack(seen).mean(dim=0)) <= ADAMW


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_gives_a_new_group_the_options_of_the_original(way: Any) -> None:
    optimizer = way(run(2)[0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert [optimizer.param_groups[-1][k] for k in ("beta1", "warmup_steps")] == [0.8, 3]
    assert optimizer.defaults["beta1"] == 0.8


def test_a_refused_gradient_moves_no_counter() -> None:
    optimizer, parameters = run(2)
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[0].grad = parameters[0].grad.to_sparse()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigurationError, match="sparse"):
        optimizer.step()
    assert not list(differences(before, optimizer.state_dict()))


def test_a_parameter_that_had_no_gradient_keeps_x_and_z() -> None:
    optimizer, parameters = run(8)
    still, others = parameters[0], parameters[1:]
    z = optimizer.state[still]["z"].clone()
    optimizer.eval()
    x = still.detach().clone()
    optimizer.train()
    still.grad = None
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.eval()
    assert torch.equal(optimizer.state[still]["z"], z)
    assert largest(still, x) <= ROUND_TRIP


def test_a_state_without_averages_starts_them_at_the_weights() -> None:
    model = gpt2()
    muon = build_optimizer(model, algo="muon")
    amuse = build_optimizer(model, algo="amuse")
    amuse.load_state_dict(muon.state_dict())
    before = values(list(model.parameters()))
    amuse.eval()
    assert not list(differences(before, values(list(model.parameters()))))


@pytest.mark.parametrize(
    "wrong", [{"beta1": 0.0}, {"beta1": 1.1}, {"rho": -1.0}, {"warmup_steps": 1}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Amuse([{"params": [nn.Parameter(torch.zeros(3))]}], **wrong)


# ---- smoothing ----


@pytest.mark.parametrize("moments", ["keep", "project"])
@pytest.mark.parametrize("way", ["floor", "now"])
def test_x_y_and_z_receive_the_edit_of_the_weights(moments: Any, way: str) -> None:
    torch.manual_seed(0)
    model = gpt2()
    optimizer = build_optimizer(model, algo="amuse", lr=0.05, beta1=0.7)
    assert is_schedule_free(optimizer)
    floor = {
        "detectors": ("stable_rank_floor",),
        "floor_ratio": 3.0,
        "floor_reference": "noise",
        "check_every_steps": 3,
    }
    config = PSSConfig.preset("paper", moments=moments, **(floor if way == "floor" else {}))
    pss = PSSController(model, config, optimizer=optimizer)
    before: list[tuple[Tensor, Tensor]] = []

    def update() -> None:
        optimizer.step()
        before[:] = [iterates(optimizer, p) for p in model.parameters()]

    for _ in range(3):
        optimizer.zero_grad()
        ids = torch.arange(16).reshape(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        pss.step(nn.utils.clip_grad_norm_(model.parameters(), 1.0), update=update)
    if way == "now":
        pss.smooth_now()
    after = [iterates(optimizer, p) for p in model.parameters()]
    num_edited = 0
    for (y, z), (new_y, new_z) in zip(before, after, strict=True):
        edit = new_y - y
        num_edited += bool(edit.any())
        assert (new_z - z - edit).norm() <= SAME_EDIT * edit.norm()
    assert num_edited >= 2
    # x is linear in both: evaluated, the model has the same edit.
    optimizer.eval()
    beta = 0.7
    for p, (y, z), (new_y, _) in zip(model.parameters(), before, after, strict=True):
        edit, x = new_y - y, z + (y - z) / beta
        assert (p.detach() - x - edit).norm() <= SAME_EDIT * x.norm()


def iterates(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    return parameter.detach().clone(), optimizer.state[parameter]["z"].clone()
