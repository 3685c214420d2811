"""Packaged optimizers against references written from their papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_pss.evidence.guards import make_guard

LR, B1, B2, EPS, WD = 1e-2, 0.9, 0.99, 1e-8, 0.1
SETTINGS = TrainingArguments(
    "unused", learning_rate=LR, adam_beta1=B1, adam_beta2=B2, weight_decay=WD, use_cpu=True
)
STEPS = 130  # past AdaGC's warm-up of 100
# Relative, after all steps: 3.1e-8 measured (SPAM and AdaGC: where ε stands), others 3e-15.
TOLERANCE = 9e-8


def gradients() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        gradient = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        yield gradient * (50.0 if step in (30, 110, 111) else 1.0)


def start() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def adagc_reference() -> Tensor:
    w, m, v, gamma = start(), 0.0, 0.0, math.inf
    for t, g in enumerate(gradients(), 1):
        norm = g.norm()
        if t < 100:
            g = g * min(1.0, 1.0 / norm)
            gamma = min(gamma, g.norm())
        else:
            g = g * min(1.0, 1.05 * gamma / norm)
            gamma = 0.98 * gamma + 0.02 * g.norm()
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        step = (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS)
        w = w - LR * step - LR * WD * w
    return w


def stable_adamw_reference() -> Tensor:
    w, m, v = start(), 0.0, 0.0
    for t, g in enumerate(gradients(), 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (B1, B2))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        rms = (g * g / v.clamp_min(EPS**2)).mean().sqrt()
        lr = LR / max(1.0, rms)
        w = w - lr * WD * w - lr * m / (v.sqrt() + EPS)
    return w


def stable_spam_reference() -> Tensor:
    w, m, v, top, mn, vn = start(), 0.0, 0.0, 0.0, 0.0, 0.0
    for t, g in enumerate(gradients(), 1):
        top = 0.999 * top + 0.001 * g.abs().max()
        limit = top / (1 - 0.999**t)
        g = torch.where(g.abs() > limit, g / g.abs().max() * limit, g)
        norm = g.norm()
        mn, vn = 0.7 * mn + 0.3 * norm, 0.9 * vn + 0.1 * norm**2
        g = g / norm * (mn / (1 - 0.7**t)) / ((vn / (1 - 0.9**t)).sqrt() + EPS)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        step = (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS)
        w = w - LR * WD * w - LR * step
    return w


def spam_reference() -> Tensor:
    """Before the first reset; the package's ε stands beside √v that is not corrected for bias."""
    w, m, v = start(), torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
    for t, g in enumerate(gradients(), 1):
        if t >= 20:
            limit = (5000 * v).sqrt()
            g = torch.where(g.abs() > limit, g.sign() * limit, g)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        w = w - LR * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS)
        w = w - LR * WD * w
    return w


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adagc", adagc_reference),
        ("stable_adamw", stable_adamw_reference),
        ("stable_spam", stable_spam_reference),
        ("spam", spam_reference),
    ],
)
def test_the_package_follows_the_paper(name: str, reference: Callable[[], Tensor]) -> None:
    model = nn.Linear(4, 6, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(start())
    make = make_guard(name).optimizer
    assert make is not None
    optimizer = make(model, SETTINGS)
    for gradient in gradients():
        model.weight.grad = gradient.clone()
        optimizer.step()
    assert deviation(model.weight, reference()) < TOLERANCE


def test_the_check_tells_optimizers_apart() -> None:
    assert deviation(adagc_reference(), spam_reference()) > 1e4 * TOLERANCE


def deviation(weight: Tensor, wanted: Tensor) -> float:
    return float(((weight - wanted).norm() / (wanted - start()).norm()).detach())
