"""The record of a run: complete, true, and without any trace in the run itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MAX_STEPS, make_trainer, weights_of
from transformers import Trainer, TrainerCallback

from hf_pss import PSSConfig
from hf_pss.evidence.early_warnings import RULES, score
from hf_pss.evidence.probes import PROBED, Probes
from hf_pss.evidence.rows import Row
from hf_pss.models.selection import named_parameters_canonical, select_matrices

OBSERVER = PSSConfig.preset("paper", observe_only=True)
STABLE_RANK_TOLERANCE = 3e-3  # the quick one's, as in tests/health


def probed(folder: Path, **options: Any) -> tuple[Trainer, dict]:
    every = options.pop("every_steps", 1)
    extra: list[TrainerCallback] = options.pop("callbacks", [])
    trainer = make_trainer(folder, OBSERVER, save_strategy="no", **options)
    for callback in extra:
        trainer.add_callback(callback)
    probes = Probes(trainer, every_steps=every)
    trainer.add_callback(probes)
    trainer.train()
    return trainer, probes.to_dict()


def test_every_series_is_recorded_at_every_step(tmp_path: Path) -> None:
    trainer, record = probed(tmp_path)
    assert record["step"] == list(range(1, MAX_STEPS + 1))
    for name in PROBED:
        assert len(record[name]) == MAX_STEPS
        assert all(isinstance(value, float) for value in record[name]), name
    json.dumps(record, allow_nan=False)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert record["grad_norm_preclip"] == pytest.approx(logged, rel=1e-6)
    assert record["seconds"] > 0


def test_the_last_entry_is_that_of_the_final_weights(tmp_path: Path) -> None:
    trainer, record = probed(tmp_path)
    parameters = named_parameters_canonical(trainer.model)
    ranks = []
    for view in select_matrices(trainer.model).matrices:
        sigma = torch.linalg.svdvals(view.read(parameters[view.parameter_name]).double())
        ranks.append(float(sigma.square().sum() / sigma[0] ** 2))
    assert record["min_stable_rank"][-1] == pytest.approx(min(ranks), rel=STABLE_RANK_TOLERANCE)
    mean = sum(ranks) / len(ranks)
    assert record["mean_stable_rank"][-1] == pytest.approx(mean, rel=STABLE_RANK_TOLERANCE)


def test_the_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    twin = make_trainer(tmp_path / "twin", None, save_strategy="no")
    twin.train()
    trainer, _ = probed(tmp_path / "probed")
    theirs, ours = weights_of(twin.model), weights_of(trainer.model)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_the_interval_can_be_chosen(tmp_path: Path) -> None:
    _, record = probed(tmp_path, every_steps=3)
    assert record["step"] == [3, 6]
    assert None not in record["mean_sign_diversity"]


class _Break(TrainerCallback):
    """Puts one bad number into one weight."""

    def __init__(self, step: int, value: float) -> None:
        self._step, self._value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            with torch.no_grad():
                kwargs["model"].transformer.h[0].mlp.c_fc.weight[0, 0] = self._value


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_leave_gaps_and_nothing_worse(tmp_path: Path, bad: float) -> None:
    _, record = probed(tmp_path, callbacks=[_Break(5, bad)])
    json.dumps(record, allow_nan=False)
    for name in ("min_stable_rank", "mean_jacobian_energy", "max_spectral_growth"):
        assert None not in record[name][:4], name
        assert record[name][4:] == [None] * 4, name


def test_gradient_accumulation_hears_every_micro_batch(tmp_path: Path) -> None:
    _, record = probed(tmp_path, gradient_accumulation_steps=2)
    assert len(record["step"]) == MAX_STEPS
    assert None not in record["mean_sign_diversity"]


def test_a_record_survives_the_file_and_every_rule_reads_it(tmp_path: Path) -> None:
    _, record = probed(tmp_path)
    row = Row(
        id="x",
        recipe="r",
        optimizer="adamw",
        learning_rate=3e-3,
        guard="none",
        seed=7,
        num_steps=MAX_STEPS,
        status="finished",
        unigram_entropy=3.9,
        losses=(3.5,) * MAX_STEPS,
        extra={"probes": record},
    )
    read = Row.from_line(row.to_line())
    assert read.extra["probes"] == record
    for name in RULES:
        found = score(name, [read], RULES[name].thresholds[0], recipe="r")
        assert found.num_healthy_readings == MAX_STEPS, name
