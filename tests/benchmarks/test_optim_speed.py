"""The whole optimizer step on GPT-2 124M's shapes, beside what people use, in one process.

Run by ``make bench``; heavyball takes part where it is installed. Rounds are interleaved and ratios
are medians over rounds, so that what disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pss.optim import MatrixOptimizer, build_optimizer, matrix_groups

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

NUM_ROUNDS = 7
NUM_THREADS = 2
MIN_SPEEDUP_OVER_TORCH = {"cpu": 1.3, "cuda": 3.0}
MIN_SPEEDUP_OVER_PEERS = 1.0
LR = 1e-3

Step = Callable[[], float]
"""Makes a step and returns its seconds."""


class TwoOptimizers:
    """One optimizer for the matrices and one for the rest, as without ours."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _ours(model: nn.Module) -> MatrixOptimizer:
    return build_optimizer(model, algo="muon", lr=LR)


def _ours_fused(model: nn.Module) -> MatrixOptimizer:
    """Q, K and V orthogonalised as one matrix, as the others do."""
    groups = matrix_groups(model)
    for group in groups:
        if group["algo"] == "muon":
            group["layouts"] = [(transposed, ()) for transposed, _ in group["layouts"]]
    return MatrixOptimizer(groups, lr=LR)


def _divided(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    groups = matrix_groups(model)
    matrices = [p for group in groups if group["algo"] == "muon" for p in group["params"]]
    others = [p for group in groups if group["algo"] != "muon" for p in group["params"]]
    return matrices, others


def _torch(model: nn.Module) -> TwoOptimizers:
    matrices, others = _divided(model)
    muon = torch.optim.Muon(matrices, lr=LR, adjust_lr_fn="match_rms_adamw")
    return TwoOptimizers(muon, torch.optim.AdamW(others, lr=LR))


def _pytorch_optimizer(model: nn.Module) -> Optimizer:
    from pytorch_optimizer import Muon

    matrices, others = _divided(model)
    groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    optimizer: Optimizer = Muon(groups, lr=LR, use_adjusted_lr=True, weight_decay=0.1)
    return optimizer


def _heavyball(model: nn.Module) -> TwoOptimizers:
    import heavyball

    matrices, others = _divided(model)
    muon = heavyball.Muon(matrices, lr=LR, weight_decay=0.1)
    return TwoOptimizers(muon, heavyball.AdamW(others, lr=LR, weight_decay=0.1))


WAYS: Mapping[str, Callable[[nn.Module], Any]] = {
    "ours": _ours,
    "ours, QKV whole": _ours_fused,
    "torch": _torch,
    "pytorch_optimizer": _pytorch_optimizer,
    **({"heavyball": _heavyball} if importlib.util.find_spec("heavyball") else {}),
}

_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", _CUDA])
# What heavyball, compiled, says of itself is not ours to mend.
@pytest.mark.filterwarnings("ignore")
def test_a_step_at_gpt2_124m(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {name: _step_of(way, device) for name, way in WAYS.items()}
    with _threads(NUM_THREADS):
        for step in steps.values():  # State is made, and what compiles is compiled.
            step(), step()
        rounds = [_round(steps, first) for first in range(NUM_ROUNDS)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in steps}
    ratios = {name: statistics.median(r[name] / r["ours"] for r in rounds) for name in steps}
    where = f"GPT-2 124M on {device}" + (f", {NUM_THREADS} threads" if device == "cpu" else "")
    rows = [f"{where}, {NUM_ROUNDS} rounds:"]
    for name, seconds in medians.items():
        rows.append(f"{name:>18} {1e3 * seconds:9.1f} ms a step, {ratios[name]:5.2f} × ours")
    _show(capsys, "\n".join(rows))
    assert ratios["torch"] >= MIN_SPEEDUP_OVER_TORCH[device]
    for peer in ratios.keys() & {"pytorch_optimizer", "heavyball"}:
        assert ratios[peer] >= MIN_SPEEDUP_OVER_PEERS


def _step_of(way: Callable[[nn.Module], Any], device: str) -> Step:
    """Return a step on a model of its own, whose gradients are always the same."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(device)
    optimizer = way(model)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]

    def step() -> float:
        # heavyball takes the gradients away.
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return _seconds(optimizer.step)

    return step


def _round(steps: Mapping[str, Step], first: int) -> dict[str, float]:
    """Time each way once, beginning with another one in every round."""
    order = islice(cycle(steps), first % len(steps), first % len(steps) + len(steps))
    return {name: steps[name]() for name in order}


def _seconds(work: Callable[[], object]) -> float:
    _wait_for_device()
    started = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - started


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def _show(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}")  # noqa: T201
