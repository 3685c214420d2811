from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LENGTH, arguments, gpt2, llama, make_trainer, token_rows
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_pss import PSSTrainer
from hf_pss.trainer.throughput import (
    Stopwatch,
    ThroughputTrainerMixin,
    flops_per_token,
    num_parameters,
    peak_flops,
    perplexity,
)

BATCH = 4


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Timed(ThroughputTrainerMixin, PSSTrainer):
    """Every micro-batch takes half a second, every evaluation and every save a hundred."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()
        self._stopwatch._clock = self.clock

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.clock.now += 0.5
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.clock.now += 100.0
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 100.0
        super()._save_checkpoint(*args, **kwargs)


class OnAKnownDevice(Timed):
    def _peak_flops(self, args: Any) -> float:
        return 1e6


def logged(trainer: Trainer, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def test_a_window_holds_training_only() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    assert watch.read(step=0, max_steps=10) == {}
    watch.begin(0)
    for step in (1, 2):
        clock.now += 2.0
        watch.add_tokens(300)
        watch.begin(step)
        watch.on_step_end()
    assert watch.read(step=2, max_steps=10) == {"tokens_per_second": 150.0, "eta_seconds": 16.0}
    clock.now += 100.0
    watch.on_save()  # an evaluation
    clock.now += 50.0
    watch.on_save()  # and a save
    clock.now += 1.0
    watch.add_tokens(300)
    watch.on_step_end()
    clock.now += 30.0
    watch.on_save()  # another evaluation, between logs
    clock.now += 2.0
    watch.add_tokens(300)
    watch.on_step_end()
    # 2 × 300 tokens in 1 + 2 s; 187 s for four steps, six to go.
    assert watch.read(step=4, max_steps=10) == {
        "tokens_per_second": 200.0,
        "eta_seconds": 187.0 / 4 * 6,
    }


def test_a_reading_without_tokens_or_seconds_leaves_the_rate_out() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.begin(3)
    assert watch.read(step=3, max_steps=5) == {}
    watch.add_tokens(5)
    assert watch.read(step=4, max_steps=5) == {"eta_seconds": 0.0}


def test_accumulated_micro_batches_count_and_evaluations_do_not(tmp_path: Path) -> None:
    options = {"max_steps": 6, "logging_steps": 2, "eval_steps": 3, "save_steps": 3}
    options |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    trainer = Timed(
        model=gpt2(),
        args=arguments(tmp_path, **options),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
    )
    trainer.train()
    rate = 2 * BATCH * LENGTH / 1.0  # tokens of a step, which takes a second
    # The stopwatch begins with the first step, before its micro-batches.
    assert logged(trainer, "throughput/tokens_per_second") == {2: rate, 4: rate, 6: rate}
    eta = logged(trainer, "throughput/eta_seconds")
    assert eta == {2: 4.0, 4: (4.0 + 200.0) / 4 * 2, 6: 0.0}
    assert not logged(trainer, "throughput/mfu")  # nobody knows a CPU's peak


def test_a_resumed_run_estimates_from_its_own_steps(tmp_path: Path) -> None:
    make_trainer(tmp_path, trainer_class=Timed, max_steps=8, save_steps=6).train()
    trainer = make_trainer(tmp_path, trainer_class=Timed, max_steps=8, save_steps=6)
    trainer.clock.now += 9000.0
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert {step: eta for step, eta in logged(trainer, "throughput/eta_seconds").items()} == {
        **{1: 3.5, 2: 3.0, 3: 2.5, 4: 2.0, 5: 1.5, 6: 1.0},
        **{7: 0.5, 8: 0.0},
    }
    rates = logged(trainer, "throughput/tokens_per_second")
    assert rates == dict.fromkeys(range(1, 9), BATCH * LENGTH / 0.5)


def test_mfu_is_the_share_of_the_peak(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=OnAKnownDevice, max_steps=1)
    trainer.train()
    flops = flops_per_token(trainer.model, context_length=LENGTH)
    expected = BATCH * LENGTH / 0.5 * flops / 1e6
    assert logged(trainer, "throughput/mfu") == {1: pytest.approx(expected)}


def test_reporters_see_the_numbers_and_the_state_file_keeps_them(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(logs))

    rows = token_rows(8)
    trainer = Timed(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=rows,
        eval_dataset={"near": rows, "far": rows},
        callbacks=[Reporter()],
    )
    trainer.train()
    assert "throughput/tokens_per_second" in seen[0]
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for name in ("near", "far"):
        line = next(line for line in history if f"eval_{name}_loss" in line)
        assert line[f"eval_{name}_perplexity"] == math.exp(line[f"eval_{name}_loss"])
    assert "eval_loss" not in history[-1]
    assert trainer.evaluate(rows)["eval_perplexity"] > 1


def test_perplexity_of_a_lost_run_is_inf() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(710.0) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_flops_of_gpt2_124m_are_nanogpts() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    # nanoGPT counts all but the 1,024 × 768 positions.
    num_params = 124_439_808 - 1024 * 768
    expected = 6 * num_params + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(model, context_length=1024) == expected


def test_an_untied_input_embedding_is_looked_up_not_multiplied() -> None:
    model = llama()
    num_params = sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    num_multiplied = num_params - model.model.embed_tokens.weight.numel()
    expected = 6 * num_multiplied + 12 * 2 * 16 * LENGTH
    assert flops_per_token(model, context_length=LENGTH) == expected


def test_what_zero_3_has_split_counts() -> None:
    """Between uses such a parameter is empty, and knows its size."""
    model = llama()
    before = flops_per_token(model, context_length=LENGTH), num_parameters(model)
    model.model.embed_tokens.weight.requires_grad = False
    of_table = model.model.embed_tokens.weight.numel()
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = parameter.new_empty(0)
    assert (flops_per_token(model, context_length=LENGTH), num_parameters(model)) == before
    assert num_parameters(model, trained=True) == before[1] - of_table


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
