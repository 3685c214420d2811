"""Slow damage that the log does not show: the blocks' share of noise's stable rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_pss.rescue import investigate as module
from hf_pss.rescue.investigate import LOW_SHARE, Investigation, investigate, noise_share
from hf_pss.runs.folder import OPTIONS_FILE

RunOf = Callable[..., Path]

# The first loss of the tiny model, summed over 11 of 12 tokens, is 3.55.
KNOWS_NOTHING, KNOWS_MORE = 3.6, 3.7


@pytest.fixture
def sound(run_of: RunOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_of("sound"), tmp_path / "run"))


def flatten(checkpoint: Path, by: float) -> None:
    """Add σ₁ `by` times over to every matrix of the blocks."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if ".h." in name and weight.ndim == 2:
            u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
            weights[name] = weight + by * sigma[0] * torch.outer(u[:, 0], vh[0])
    save_file(weights, path, {"format": "pt"})


def looked_at(run: Path, entropy: float = KNOWS_NOTHING) -> Investigation:
    return investigate(run, margin_steps=5, unigram_entropy=entropy)


def kind_of(found: Investigation) -> str | None:
    return None if found.failure is None else found.failure.kind


def test_low_ranks_are_damage_from_the_beginning(sound: Path) -> None:
    assert kind_of(looked_at(sound)) is None
    flatten(sound / "checkpoint-60", 3.0)
    found = looked_at(sound)
    failure = found.failure
    assert failure is not None
    assert (failure.kind, failure.onset_step, failure.noticed_step) == ("slow_damage", 1, 60)
    low = [one.step for one in found.checkpoints if (noise_share(one) or 1.0) < LOW_SHARE]
    assert low == [60]
    assert "(0.01 at its peak)" in failure.text
    assert found.choice.chosen is not None
    assert found.choice.chosen.step == 20
    assert found.choice.is_last_resort


def test_trained_weights_are_not_judged(sound: Path) -> None:
    flatten(sound / "checkpoint-60", 3.0)
    assert kind_of(looked_at(sound, KNOWS_MORE)) is None


@pytest.mark.parametrize(
    ("limit", "value"), [("_EARLY_STEPS", 59), ("_WIDEST", 31), ("_FEWEST_MATRICES", 13)]
)
def test_networks_beyond_the_measured_sizes_are_not_judged(
    sound: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    flatten(sound / "checkpoint-60", 3.0)
    monkeypatch.setattr(module, limit, value)
    assert kind_of(looked_at(sound)) is None


def test_an_early_spike_may_follow_from_damage_before_it(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(run_of("huge_rate"), tmp_path / "run"))
    flatten(run / "checkpoint-80", 3.0)  # behind the onset: that is the spike's own doing
    assert kind_of(looked_at(run)) == "spike"
    flatten(run / "checkpoint-40", 3.0)
    found = looked_at(run)
    assert kind_of(found) == "slow_damage"
    assert any("Also found: A spike at step" in note for note in found.notes)
    monkeypatch.setattr(module, "_EARLY_STEPS", 60)
    assert kind_of(looked_at(run)) == "spike"


def test_without_a_logged_loss_ranks_are_not_judged(sound: Path) -> None:
    flatten(sound / "checkpoint-60", 3.0)
    for path in sound.rglob("trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"log_history": []}))
    assert kind_of(looked_at(sound)) is None


def averaged(run: Path, first_two: tuple[float, float]) -> None:
    """Let the log hold a row every five steps, and begin with these means."""
    for path in run.rglob("trainer_state.json"):
        state = json.loads(path.read_text())
        rows = [row for row in state["log_history"] if row["step"] % 5 == 0]
        rows[0]["loss"], rows[1]["loss"] = first_two
        path.write_text(json.dumps(state | {"log_history": rows}))


@pytest.mark.parametrize(
    ("first_two", "is_failure"),
    [((3.0, 2.8), True), ((2.4, 2.39), False)],  # estimates of the first loss: 3.8 and 2.44
)
def test_a_first_mean_does_not_hide_damage(
    sound: Path, first_two: tuple[float, float], is_failure: bool
) -> None:
    averaged(sound, first_two)
    assert not any("random weights" in note for note in looked_at(sound).notes)
    flatten(sound / "checkpoint-60", 3.0)
    found = looked_at(sound)
    assert (kind_of(found) == "slow_damage") == is_failure
    assert any("If the run began from random" in note for note in found.notes) != is_failure


@pytest.mark.parametrize(("start", "kind"), [("model_config", "slow_damage"), ("model", None)])
def test_the_options_of_a_run_show_how_it_began(sound: Path, start: str, kind: str | None) -> None:
    averaged(sound, (2.4, 2.39))
    flatten(sound / "checkpoint-60", 3.0)
    (sound / OPTIONS_FILE).write_text(json.dumps({start: "gpt2"}))
    assert kind_of(looked_at(sound)) == kind
    assert looked_at(sound).began_from_noise == (kind is not None)
