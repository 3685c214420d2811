"""PSS on, never triggered ≡ the plain Trainer, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EAGER,
    OUT_OF_REACH,
    controller_of,
    differences,
    events_of,
    history,
    run_differences,
    steps_of,
    train,
)

# Each model, preset and option at least once, not their product.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2 paper": ("gpt2", "paper", {}),
    "llama paper": ("llama", "paper", {}),
    "bert paper": ("bert", "paper", {}),
    "gpt2 floor": ("gpt2", "floor", {"gradient_accumulation_steps": 3}),
    "llama floor": ("llama", "floor", {}),
    "bert floor": ("bert", "floor", {"gradient_accumulation_steps": 3}),
    "llama anchored": ("llama", "anchored", {"gradient_accumulation_steps": 3, "logging_steps": 5}),
    "bert anchored": ("bert", "anchored", {"max_grad_norm": 0.0}),
    "gpt2 all": ("gpt2", "all detectors", {"max_grad_norm": 1e-3}),
    "llama all": ("llama", "all detectors", {"bf16": True}),
    "gpt2 observing": ("gpt2", "observe only", {"max_grad_norm": 1e9}),
    "bert observing": ("bert", "observe only", {"gradient_accumulation_steps": 3}),
    "gpt2 unclipped": ("gpt2", "paper", {"max_grad_norm": 0.0, "gradient_accumulation_steps": 3}),
    "llama clipped": ("llama", "paper", {"max_grad_norm": 1e-3, "bf16": True}),
    "gpt2 checkpointing": (
        "gpt2",
        "anchored",
        {"gradient_checkpointing": True, "logging_steps": 5},
    ),
    "llama unfused": ("llama", "anchored", {"optim": "adamw_torch", "lr_scheduler_type": "cosine"}),
}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.replace(" ", "-"))
def test_a_run_without_intervention_is_the_plain_trainers(run: str, tmp_path: Path) -> None:
    model, preset, options = RUNS[run]
    plain = train(tmp_path / "plain", model_name=model, **options)
    pss = train(tmp_path / "pss", OUT_OF_REACH[preset], model_name=model, **options)
    assert run_differences(plain, pss) == []
    assert steps_of(events_of(tmp_path / "pss")) == []
    assert controller_of(pss).step_number == plain.state.global_step


def test_observing_saw_spikes_and_floors_in_the_run_that_stayed_equal(tmp_path: Path) -> None:
    train(tmp_path, OUT_OF_REACH["observe only"])
    kinds = {(event["kind"], event["decision"]) for event in events_of(tmp_path)}
    assert kinds == {("spike", "observe"), ("floor", "observe")}


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    pss = train(tmp_path / "pss", EAGER)
    assert steps_of(events_of(tmp_path / "pss"))
    found = run_differences(plain, pss)
    assert "model.safetensors" in found
    assert any(place.startswith("log") for place in found)
    assert any(place.startswith("optimizer.pt") for place in found)


def test_one_changed_bit_is_seen() -> None:
    zero, minus_zero = {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, -0.0])}
    assert list(differences(zero, zero)) == []
    assert list(differences(zero, minus_zero)) == ["/w: tensors differ"]


def test_the_log_gains_only_pss_keys(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    pss = train(tmp_path / "pss", OUT_OF_REACH["paper"])
    assert history(pss) == history(plain)
    added = [set(a) - set(b) for a, b in zip(pss.state.log_history, plain.state.log_history)]  # noqa: B905
    assert added[:-1]
    assert all({"pss/grad_norm_preclip", "pss/interventions"} <= keys for keys in added[:-1])
    assert all(key.startswith("pss/") for keys in added for key in keys)
