"""One trained cell: its row, and that nothing leaks from one run into the next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from small_library import corpus_cache, use_small_library
from sweep_cells import TINY, cell

from hf_pss.config import PSSConfig
from hf_pss.evidence import worker
from hf_pss.evidence.recipes import Fault
from hf_pss.evidence.rows import Row
from hf_pss.evidence.worker import CellTrainer, run_cell

STEPS = 4
# A floor at which fresh matrices already lie.
EAGER = PSSConfig.preset("floor", floor_ratio=1.0, floor_reference="noise", check_every_steps=1)


@pytest.fixture(autouse=True)
def _corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_library(monkeypatch)


def curve(row: Row) -> tuple[object, ...]:
    return row.losses, row.grad_norms, row.eval_losses, row.final_eval_loss


def test_a_row_holds_the_whole_run() -> None:
    row = run_cell(cell())
    assert (row.status, row.error) == ("finished", None)
    assert len(row.losses) == len(row.grad_norms) == row.num_steps == STEPS
    assert all(loss is not None and 0 < loss < 8 for loss in row.losses)
    assert row.eval_steps == (2, 4)
    assert row.final_eval_loss == row.eval_losses[-1]
    assert 0 < row.guard_seconds < row.train_seconds
    assert row.interventions == ()
    assert row.explosion_kind is None
    assert 3 < row.unigram_entropy < math.log(TINY["vocab_size"])
    assert row.versions["torch"]
    assert Row.from_line(row.to_line()) == row


def test_a_run_is_the_same_alone_and_after_another() -> None:
    alone = run_cell(cell("none"))
    run_cell(cell("random_clip", seed=3))
    assert curve(run_cell(cell("none"))) == curve(alone)


def test_guards_are_paired_and_seeds_are_not() -> None:
    """Same first batch and same weights for every guard, whatever it draws or builds."""
    first = run_cell(cell("none")).losses[0]
    for guard in ("clip", "random_clip", "stable_adamw", "paper"):
        assert run_cell(cell(guard)).losses[0] == first
    assert run_cell(cell("none", seed=1)).losses[0] != first


def test_clipping_at_a_huge_norm_is_no_guard() -> None:
    watching = PSSConfig.preset("paper", observe_only=True)  # the clipping is the recipe's
    clipped = replace(cell(max_grad_norm=1e9), guard_name="mine", pss=watching)
    assert curve(run_cell(clipped)) == curve(run_cell(cell("none")))


def test_a_guard_that_acts_says_when() -> None:
    row = run_cell(replace(cell(), guard_name="mine", pss=EAGER))
    assert row.interventions
    assert set(row.interventions) <= set(range(1, STEPS + 1))
    assert row.guard_seconds > 0


def test_a_nan_gradient_under_an_observer_ruins_the_run_and_is_called_an_explosion() -> None:
    row = run_cell(cell("none", fault=Fault("nan_gradient", start=2)))
    assert row.losses[1] is not None  # the gradient breaks, not yet the loss
    assert row.losses[2:] == (None, None)
    assert row.grad_norms[1] is None
    assert (row.explosion_kind, row.explosion_step) == ("non_finite", 3)
    assert row.final_eval_loss is None
    assert (row.extra["fault_start"], row.extra["fault_end"]) == (2, 2)
    assert Row.from_line(row.to_line()) == row


def test_a_nan_gradient_is_skipped_by_pss() -> None:
    row = run_cell(cell("paper", fault=Fault("nan_gradient", start=2)))
    assert None not in row.losses
    assert row.final_eval_loss is not None


def test_random_tokens_are_the_same_for_every_guard_and_for_their_steps_only() -> None:
    fault = Fault("random_batch", start=3)
    harmed, plain = run_cell(cell("none", fault=fault)), run_cell(cell("none"))
    assert harmed.losses[:2] == plain.losses[:2]
    assert harmed.losses[2] != plain.losses[2]
    assert run_cell(cell("none", fault=fault)).losses == harmed.losses


def test_a_high_learning_rate_is_felt_after_its_first_step() -> None:
    fault = Fault("high_learning_rate", start=2, factor=1000.0)
    harmed, plain = run_cell(cell("none", fault=fault)), run_cell(cell("none"))
    assert harmed.losses[:2] == plain.losses[:2]
    assert harmed.losses[2] != plain.losses[2]


def test_probes_are_kept_at_their_rhythm() -> None:
    row = run_cell(cell("none", probes_every_steps=2))
    assert tuple(row.extra["probes"]["step"]) == (2, 4)


def test_health_is_kept_at_its_rhythm_and_changes_nothing() -> None:
    watching = PSSConfig.preset("paper", observe_only=True, health="full", health_every_steps=2)
    row = run_cell(replace(cell(), guard_name="mine", pss=watching, probes_every_steps=2))
    plain = run_cell(
        replace(cell(), guard_name="mine", pss=PSSConfig.preset("paper", observe_only=True))
    )
    assert curve(row) == curve(plain)
    health = row.extra["health"]
    assert health["step"] == [2, 4]
    assert {"stable_rank/min", "effective_rank/median", "trimmed_sqrt_condition"} <= set(health)
    assert row.extra["probes"]["step"] == [2, 4]
    assert "health" not in plain.extra
    assert Row.from_line(row.to_line()) == row


def test_a_post_ln_model_and_another_optimizer_train_too() -> None:
    row = run_cell(cell("floor", recipe="collapse", optimizer="sgd"))
    assert row.status == "finished"
    assert len(row.losses) == STEPS


def test_repeated_tokens_harm_their_steps_only() -> None:
    fault = Fault("repeated_token", start=3)
    harmed, plain = run_cell(cell("none", fault=fault)), run_cell(cell("none"))
    assert harmed.losses[:2] == plain.losses[:2]
    assert harmed.losses[2] != plain.losses[2]
    assert run_cell(cell("clip", fault=fault)).losses[:3] == harmed.losses[:3]


def test_rows_are_short_before_a_sequence_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Watched(CellTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                lengths.append(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(worker, "CellTrainer", Watched)
    row = run_cell(cell("none", fault=Fault("sequence_jump", start=3)))
    whole = TINY["context_length"]
    assert lengths == [whole // 2, whole // 2, whole, whole]
    assert (row.extra["fault_start"], row.extra["fault_end"]) == (3, 3)
    # The mean is over the tokens of the short rows. Transformers also counts their first token.
    assert row.losses == pytest.approx([math.log(TINY["vocab_size"])] * STEPS, rel=0.08)


@pytest.mark.parametrize("architecture", ["gpt2", "moe", "bert", "vit"])
def test_weights_and_moments_in_bfloat16(architecture: str) -> None:
    corpus = "digits" if architecture == "vit" else "python"
    options = {"architecture": architecture, "corpus": corpus}
    row = run_cell(cell("paper", dtype="bfloat16", **options))
    assert row.status == "finished"
    assert None not in row.losses
    assert row.losses != run_cell(cell("paper", **options)).losses


def test_a_continued_run_starts_from_trained_weights() -> None:
    fresh, continued = run_cell(cell("none")), run_cell(cell("none", pretrain_steps=12))
    assert continued.losses[0] < fresh.losses[0] - 0.05
    assert len(continued.losses) == STEPS
    (kept,) = corpus_cache().glob("weights-*.pt")
    changed = kept.stat().st_mtime_ns
    assert curve(run_cell(cell("none", pretrain_steps=12))) == curve(continued)
    other = run_cell(cell("clip", pretrain_steps=12, warmup_steps=0))
    assert other.losses[0] == continued.losses[0]
    assert kept.stat().st_mtime_ns == changed
    assert run_cell(cell("none", seed=1, pretrain_steps=12)).losses[0] != continued.losses[0]


def test_only_adapters_train_after_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    trainable: list[str] = []

    class Watched(CellTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            trainable[:] = [n for n, p in self.model.named_parameters() if p.requires_grad]
            return super().train(*args, **kwargs)

    monkeypatch.setattr(worker, "CellTrainer", Watched)
    whole = run_cell(cell(pretrain_steps=12))
    adapted = cell(pretrain_steps=12, lora_rank=2, num_steps=12)
    row = run_cell(adapted)
    assert len(trainable) == 2 * 4 * TINY["num_layers"]
    assert all("lora_" in name for name in trainable)
    # Adapters begin at zero, so the first loss is that of the trained model.
    assert row.losses[0] == pytest.approx(whole.losses[0], abs=1e-5)
    assert row.losses[3] != whole.losses[3]
    eager = PSSConfig.preset("paper", threshold_ratio=1.001, calibration_steps=1, cooldown_steps=0)
    smoothed = run_cell(replace(adapted, guard_name="mine", pss=eager))
    assert smoothed.interventions
    assert smoothed.losses != row.losses
