"""ZClip's and OLMo's rules against plain transcriptions; NaN blinds neither of them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sweep_guards import trainer_of
from torch import nn
from transformers import TrainerCallback

from hf_pss.evidence.guard_callbacks import OlmoSkipStep, SkipStepRule, ZClip, ZClipRule
from hf_pss.evidence.guards import Guard, make_guard

NORMS = np.random.default_rng(0).lognormal(sigma=0.3, size=400).tolist()
SPIKES = {60: 30.0, 61: 8.0, 200: 5.0, 300: 100.0}
SERIES = [SPIKES.get(i, norm) for i, norm in enumerate(NORMS)]
ROUNDING = 1e-9  # the same operations in another order: 3e-16 measured


def test_zclip_is_the_papers_rule() -> None:
    rule = ZClipRule()
    mean, variance = statistics.fmean(SERIES[:25]), statistics.pvariance(SERIES[:25])
    clipped = 0
    for i, norm in enumerate(SERIES):
        limit = rule.limit(norm)
        if i < 25:
            assert limit is None
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        wanted = mean + 2.5 * math.sqrt(variance) / (z / 2.5) if z > 2.5 else None
        assert (limit is None) == (wanted is None)
        if limit is not None and wanted is not None:
            assert math.isclose(limit, wanted, rel_tol=ROUNDING)
            assert mean < limit < norm
            clipped += 1
        seen = norm if wanted is None else wanted
        mean = 0.97 * mean + 0.03 * seen
        variance = 0.97 * variance + 0.03 * (seen - mean) ** 2
    assert clipped >= len(SPIKES)


def test_zclip_sees_a_spike_after_a_nan() -> None:
    rule = ZClipRule()
    for norm in SERIES[:50]:
        rule.limit(norm)
    assert rule.limit(math.nan) is None
    assert rule.limit(math.inf) is None
    limit = rule.limit(50.0)
    assert limit is not None
    assert limit < 2.0


def test_skip_step_is_olmos_rule() -> None:
    rule = SkipStepRule()
    past: list[float] = []
    skipped = []
    for i, norm in enumerate(SERIES):
        past = [*past, norm][-129:]
        window = torch.tensor(past[:-1], dtype=torch.float64)
        is_outlier = len(past) >= 64 and norm - window.mean() > 6 * window.std()
        assert rule.skips(1.0, norm) == bool(is_outlier)
        skipped += [i] if is_outlier else []
    assert skipped == [200, 300]


def test_skip_step_costs_one_step_for_one_nan() -> None:
    rule = SkipStepRule()
    for norm in SERIES[:59]:
        rule.skips(1.0, norm)
    assert rule.skips(1.0, math.nan)
    assert rule.skips(math.inf, 1.0)
    assert not any(rule.skips(1.0, norm) for norm in SERIES[62:80])
    assert rule.skips(1.0, 50.0)


class _Norms(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))


def test_zclip_scales_the_raw_gradient_of_a_run(tmp_path: Path) -> None:
    rule = ZClipRule(calibration_steps=3, z_thresh=0.1)
    guard = Guard("", "", max_grad_norm=0.0, callback=lambda trainer: ZClip(rule))
    trainer, own = trainer_of(tmp_path, guard, max_steps=8)
    after = _Norms()
    trainer.add_callback(after)
    trainer.train()
    raw = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert own is not None
    assert own.intervention_steps
    assert min(own.intervention_steps) > 3
    twin = ZClipRule(calibration_steps=3, z_thresh=0.1)
    for step, (before, seen) in enumerate(zip(raw, after.norms, strict=True), 1):
        limit = twin.limit(before)
        assert (limit is not None) == (step in own.intervention_steps)
        assert math.isclose(seen, before if limit is None else limit, rel_tol=1e-5)


def test_a_skipped_step_moves_no_weight(tmp_path: Path) -> None:
    weights = []
    for steps in (2, 5):
        options = {"max_steps": steps, "lr_scheduler_type": "constant"}
        trainer, own = trainer_of(tmp_path, make_guard("olmo_skip"), **options)
        assert isinstance(own, OlmoSkipStep)
        # Judges from the third step on, and finds every value too large.
        own.rule = SkipStepRule(window_steps=6, sigma_factor=-1e9)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        assert own.intervention_steps == list(range(3, steps + 1))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
