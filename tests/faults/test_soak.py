"""3,000 steps with a random fault every fifty: the loss of the clean run, and nothing forgotten."""

from __future__ import annotations

import random
import resource
from pathlib import Path
from typing import Any

import pytest
from helpers import events_of, gpt2, make_trainer, token_rows
from injectors import FAULTS, LASTING, SKIPPED, Injector
from transformers import set_seed

from hf_pss import PSSConfig

STEPS = 3000
EVERY_STEPS = 50
SEED = 20260201
LOSS_DRIFT_NATS = 0.05  # 0.042
MEMORY_DRIFT_MIB = 5  # 1.7; a leak of one model with its moments a fault would be 17
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 25,
    "save_total_limit": 2,
    "logging_steps": 10,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 8,
}
CONFIG = PSSConfig(
    # The norms of rows learned by heart jump by themselves, by three and more.
    threshold_ratio=10.0,
    calibration_steps=20,
    on_failure="rollback",
    max_nonfinite_streak=3,
    max_rollbacks=1000,
)
# A clock that jumps has no effect, and flipped labels none that a norm would show.
ACCOUNTED = (*SKIPPED, *LASTING, "spike", "full disk", "NaN buffer")


def plan_of_faults() -> dict[int, str]:
    generator = random.Random(SEED)
    plan = {}
    for step in range(3 * EVERY_STEPS, STEPS - EVERY_STEPS, EVERY_STEPS):
        name = generator.choice(FAULTS)
        at = step + generator.randrange(-15, 16)
        if name == "full disk":  # something must be saved for a full disk to matter
            at = round(at / 25) * 25
        plan[at] = name
    return plan


def fresh_model() -> Any:
    set_seed(SEED)
    return gpt2(2, 32)


def mean_loss(trainer: Any) -> float:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line][-20:]
    return sum(losses) / len(losses)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_run_with_faults_ends_as_the_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = token_rows(512)
    clean = make_trainer(tmp_path / "clean", PSSConfig(), model=fresh_model(), rows=rows, **OPTIONS)
    clean.train()
    before = peak_mib()
    plan = plan_of_faults()
    trainer = make_trainer(tmp_path / "soak", CONFIG, model=fresh_model(), rows=rows, **OPTIONS)
    injector = Injector(trainer, plan, monkeypatch)
    trainer.train()
    assert trainer.state.global_step == STEPS
    drift = mean_loss(trainer) - mean_loss(clean)
    assert drift <= LOSS_DRIFT_NATS
    assert peak_mib() - before <= MEMORY_DRIFT_MIB
    events = events_of(tmp_path / "soak")
    happened = {step: name for step, name in injector.done}
    # A fault whose step was skipped by a rollback never happened.
    assert len(happened) >= 0.8 * len(plan)
    for step, name in happened.items():
        if name in ACCOUNTED:
            near = [event for event in events if step <= event["step"] <= step + 30]
            assert near, (step, name)
