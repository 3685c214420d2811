"""What health costs beside what people use, and beside a training step; medians of paired runs.

Run by ``make bench``; docs/health.md keeps dated results. WeightWatcher's `analyze` is run where
it is installed, otherwise its published procedure: a full SVD of each matrix and the maximum
likelihood fit of a power law to its squared singular values, every one tried as the start of the
tail (Clauset, Shalizi & Newman 2009, arXiv 0706.1062).
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pss import PSSConfig, PSSController
from hf_pss.distributed import OneProcess
from hf_pss.health.tracked import SpectrumTracker
from hf_pss.selection import MatrixView, named_parameters_canonical, select_matrices

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

MIN_SPEED_UP_SVDVALS = 80
MIN_SPEED_UP_WEIGHTWATCHER = 300
MAX_ERROR = 0.01
NUM_DRIFT_STEPS = 50
MAX_SHARES = {"light": 0.01, "standard": 0.03}
NUM_REFRESHES = 15
SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}
XL = (48, 1600)


def build(**options: int) -> nn.Module:
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _exact(view: MatrixView, parameters: dict[str, nn.Parameter]) -> tuple[float, float]:
    """σ₁ and the stable rank by the eigenvalues of WᵀW in float64, good to 1e-13 for the first."""
    weight = view.read(parameters[view.parameter_name]).double()
    weight = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    sigma = float(torch.linalg.eigvalsh(weight.mT @ weight)[-1]) ** 0.5
    return sigma, float(weight.norm() / sigma) ** 2


def _worst_error(
    tracker: SpectrumTracker,
    parameters: dict[str, nn.Parameter],
    exact: dict[str, tuple[float, float]],
) -> tuple[float, float]:
    """Return the largest relative errors of σ₁ and of the stable rank."""
    found = tracker.read(parameters)
    return (
        max(abs(found[name].sigma / sigma - 1) for name, (sigma, _) in exact.items()),
        max(abs(found[name].stable_rank / rank - 1) for name, (_, rank) in exact.items()),
    )


# What WeightWatcher warns of is not ours to mend.
@pytest.mark.filterwarnings("ignore")
def test_a_refresh_beside_what_people_use(capsys: pytest.CaptureFixture[str]) -> None:
    """All 48 block matrices of GPT-2 124M, warm: 15 refreshes before and after each alternative."""
    torch.set_num_threads(2)
    # The others look at embeddings, too: small ones, so that blocks are compared with blocks.
    model = build(vocab_size=64, n_positions=64)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    assert len({view.parameter_name for view in views}) == 48
    weights = [view.read(parameters[view.parameter_name]).contiguous() for view in views]
    tracker = SpectrumTracker(views, OneProcess())
    cold = _seconds(lambda: tracker.refresh(parameters))

    def refreshes() -> list[float]:
        return [_seconds(lambda: tracker.refresh(parameters)) for _ in range(NUM_REFRESHES)]

    times = refreshes()
    svdvals = _seconds(lambda: [torch.linalg.svdvals(weight) for weight in weights])
    times += refreshes()
    name, fit = _weightwatcher(model, weights)
    others = _seconds(fit)
    times += refreshes()
    warm = statistics.median(times)
    _show(
        capsys,
        f"GPT-2 124M, {torch.get_num_threads()} threads: a warm refresh {1e3 * warm:.0f} ms "
        f"(fastest {1e3 * min(times):.0f}), the cold one {cold:.2f} s",
    )
    _show(capsys, f"torch.linalg.svdvals {svdvals:.1f} s: {svdvals / warm:.0f} × the refresh")
    _show(capsys, f"{name} {others:.1f} s: {others / warm:.0f} × the refresh")
    assert svdvals / warm >= MIN_SPEED_UP_SVDVALS
    assert others / warm >= MIN_SPEED_UP_WEIGHTWATCHER


@pytest.mark.parametrize(
    ("lr", "num_warmup_steps", "batch"), [(1e-4, 1, (2, 64)), (6e-4, 20, (1, 32))]
)
def test_error_after_fifty_steps(
    lr: float, num_warmup_steps: int, batch: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 124M from its initialisation, AdamW, 50 steps of random tokens."""
    torch.set_num_threads(2)
    model = build()
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    each, once = (SpectrumTracker(views, OneProcess()) for _ in range(2))
    each.refresh(parameters), once.refresh(parameters)
    for i in range(NUM_DRIFT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (i + 1) / num_warmup_steps)
        tokens = torch.randint(0, 50257, batch)
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        each.refresh(parameters)
    once.refresh(parameters)
    exact = {view.name: _exact(view, parameters) for view in views}
    sigma, rank = _worst_error(each, parameters, exact)
    late = _worst_error(once, parameters, exact)
    stale = sum(one.is_stale for one in once.read(parameters).values())
    _show(
        capsys,
        f"lr {lr:g}: refreshed at each step, worst error of σ₁ {sigma:.2%}, of the stable rank "
        f"{rank:.2%}; once at the end {late[0]:.0%}, {late[1]:.0%}, {stale} of 72 stale by then",
    )
    assert sigma <= MAX_ERROR


@pytest.mark.parametrize("preset", ["light", "standard"])
def test_share_of_a_training_step(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 124M, batch 8 × 256, the default rhythm: one period of ten steps, health's clock."""
    torch.set_num_threads(2)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pss = PSSController(model, PSSConfig(detectors=(), health=preset), optimizer=optimizer)
    assert pss.health is not None

    def train(num_rows: int, num_tokens: int) -> None:
        tokens = torch.randint(0, 50257, (num_rows, num_tokens))
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pss.step(norm, update=optimizer.step, loss=loss)

    for _ in range(pss.health.every_steps):  # cold starts and the first reading: of any batch
        train(1, 32)
    train(8, 256)  # its memory is allocated
    before = pss.health.seconds
    whole = _seconds(lambda: [train(8, 256) for _ in range(pss.health.every_steps)])
    own = pss.health.seconds - before
    share = own / (whole - own)
    _show(
        capsys,
        f"{preset}: {1e3 * own / pss.health.every_steps:.0f} ms a step, {share:.2%} of one of "
        f"{(whole - own) / pss.health.every_steps:.2f} s",
    )
    assert share <= MAX_SHARES[preset]


def test_growth_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes up to GPT-2 XL, 1.5B: one layer is held and followed, times the number of layers."""
    torch.set_num_threads(2)
    for name, (layers, width) in {**SIZES, "gpt2-xl": XL}.items():
        model = build(n_layer=1, n_embd=width, n_head=width // 64, vocab_size=64)
        views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
        tracker = SpectrumTracker(views, OneProcess())
        tracker.refresh(parameters)
        # What the caches hold of one small layer a whole model would find gone.
        flush = torch.empty(2**24)
        times = []
        for _ in range(NUM_REFRESHES):
            flush.add_(1)
            times.append(_seconds(lambda t=tracker, p=parameters: t.refresh(p)))
        count = sum(view.shape[0] * view.shape[1] for view in views)
        seconds = layers * statistics.median(times)
        _show(
            capsys,
            f"{name}: {layers} layers, {layers * count / 1e6:.0f} M weights, {1e3 * seconds:.0f} "
            f"ms a refresh, {1e9 * seconds / (layers * count):.2f} ns a weight",
        )


def _weightwatcher(model: nn.Module, weights: list[Tensor]) -> tuple[str, Callable[[], object]]:
    if importlib.util.find_spec("weightwatcher") is not None:
        import weightwatcher

        return "WeightWatcher's analyze", weightwatcher.WeightWatcher(model=model).analyze
    return "WeightWatcher's published procedure", lambda: [_power_law(w) for w in weights]


def _power_law(weight: Tensor) -> tuple[float, float]:
    """Return the exponent and the Kolmogorov–Smirnov distance of the best tail."""
    _, sigma, _ = np.linalg.svd(weight.numpy().astype(np.float64), full_matrices=False)
    values = np.sort(sigma**2)
    best = (np.inf, np.inf)
    for first in range(len(values) - 1):
        tail = values[first:]
        logs = np.log(tail / tail[0])
        alpha = 1 + len(tail) / logs.sum()
        model = 1 - np.exp((1 - alpha) * logs)
        distance = np.abs(model - np.arange(len(tail)) / len(tail)).max()
        best = min(best, (distance, alpha))
    return best[1], best[0]


def _show(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}")  # noqa: T201
