"""An intervention that raises the loss is taken back, and leaves no trace."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained import language, loss_of, trained_gpt2

from hf_pss import PSSConfig, PSSController, config
from hf_pss.config import PRESETS
from hf_pss.detection.policy import Action
from hf_pss.models.distributed import Backend
from hf_pss.models.intervention import Trial
from hf_pss.records.events import Intervention, from_json_line, to_json_line

ROWS = language(0, 64)
# Without an anchor every function moves these trained matrices, and all but one does harm.
UNANCHORED = {"detectors": ("grad_norm_ratio",), "anchor": "off", "trial": "spikes"}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def smooth(model: nn.Module, optimizer: Any = None, **options: Any) -> Intervention:
    pss = PSSController(
        model,
        PSSConfig.preset("anchored", **{**UNANCHORED, **options}),
        optimizer=optimizer,
        evaluate_loss=lambda: loss_of(model, ROWS),
    )
    return pss.smooth_now()


@pytest.mark.parametrize("smoothing", ["clip", "log", "softplus", "hammer", "polar"])
def test_harm_is_taken_back_to_the_last_bit(smoothing: str) -> None:
    model = trained_gpt2()
    before, loss = bits(model), loss_of(model, ROWS)
    record = smooth(model, smoothing=smoothing)
    assert record.event.decision is Action.UNDO
    assert record.loss_before == pytest.approx(loss, rel=1e-6)
    assert record.loss_after is not None
    assert record.loss_after > loss * 1.002
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert from_json_line(to_json_line(record)) == record
    # And without the trial the same call does the harm.
    smooth(model, smoothing=smoothing, trial="off")
    assert loss_of(model, ROWS) == pytest.approx(record.loss_after, rel=1e-6)


def test_within_the_margin_it_is_kept() -> None:
    model = trained_gpt2()
    record = smooth(model, trial_margin_ratio=10.0)
    assert record.event.decision is Action.ACT
    assert loss_of(model, ROWS) == pytest.approx(record.loss_after, rel=1e-6)


def test_the_margin_is_a_share_of_the_loss() -> None:
    """The same edit has the same fate when the loss is multiplied by a constant."""
    for factor in (1e-3, 1.0, 1e3):
        model = trained_gpt2()
        pss = PSSController(
            model,
            PSSConfig.preset("anchored", **UNANCHORED, trial_margin_ratio=0.01, smoothing="clip"),
            evaluate_loss=lambda model=model, factor=factor: factor * loss_of(model, ROWS),
        )
        assert pss.smooth_now().event.decision is Action.UNDO


@pytest.mark.parametrize("moments", ["reset", "project"])
def test_moments_are_edited_only_where_the_edit_is_kept(moments: str) -> None:
    for margin, is_kept in ((1e-6, False), (10.0, True)):
        model = trained_gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model(input_ids=ROWS[:8], labels=ROWS[:8]).loss.backward()
        optimizer.step()
        weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        before = optimizer.state[weight]["exp_avg"].clone()
        smooth(model, optimizer, moments=moments, trial_margin_ratio=margin)
        assert torch.equal(before, optimizer.state[weight]["exp_avg"]) is not is_kept


def test_nothing_is_evaluated_where_nothing_is_written() -> None:
    model = trained_gpt2()
    calls: list[int] = []

    def evaluate() -> float:
        calls.append(1)
        return loss_of(model, ROWS)

    config = PSSConfig.preset("anchored", detectors=("grad_norm_ratio",))
    record = PSSController(model, config, evaluate_loss=evaluate).smooth_now()
    assert not calls
    assert record.loss_before is None
    assert {change.status for change in record.matrices} == {"unchanged"}


def test_two_forward_passes_for_an_intervention() -> None:
    model = trained_gpt2()
    calls: list[int] = []

    def evaluate() -> float:
        calls.append(1)
        return loss_of(model, ROWS)

    config = PSSConfig.preset("anchored", **UNANCHORED)
    PSSController(model, config, evaluate_loss=evaluate).smooth_now()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("losses", "is_kept"),
    [
        ((4.0, 4.0), True),
        ((4.0, 5.0), False),
        ((4.0, math.nan), False),
        ((4.0, math.inf), False),
        ((math.nan, 4.0), True),
        ((math.inf, 4.0), True),
        ((None, 4.0), False),
        ((4.0, None), False),
        ((-2.0, -1.99), False),
        ((-2.0, -2.5), True),
    ],
)
def test_the_decision(losses: tuple[float | None, ...], is_kept: bool) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    weight.data.fill_(1.0)
    given = iter(losses)
    trial = Trial(lambda: next(given), model, Backend(), 0.002, keeps_untried=False)
    trial.before_write(["weight"])
    weight.data.fill_(2.0)
    assert trial.is_kept() is is_kept
    assert weight[0, 0].item() == (2.0 if is_kept else 1.0)


def test_an_error_in_the_evaluation_is_logged_and_training_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = trained_gpt2()

    def evaluate() -> float:
        raise RuntimeError("no batch")

    before = bits(model)
    config = PSSConfig.preset("anchored", **UNANCHORED, calibration_steps=1)
    pss = PSSController(model, config, evaluate_loss=evaluate)
    for norm in (1.0, 9.0):
        report = pss.step(norm, update=lambda: None)
    (record,) = report.records
    assert isinstance(record, Intervention)
    assert record.event.decision is Action.UNDO
    assert record.event.reason == "there was no loss to try it on"
    assert "no batch" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    # What a person asks for is done all the same.
    assert pss.smooth_now().event.decision is Action.ACT


def test_a_controller_without_a_loss_warns_that_the_check_is_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        PSSController(trained_gpt2(), PSSConfig())
    assert "evaluate_loss" in caplog.text
    caplog.clear()
    for preset in ("paper", "floor"):
        PSSController(trained_gpt2(), PSSConfig.preset(preset))
    PSSController(trained_gpt2(), PSSConfig(), evaluate_loss=lambda: 1.0)
    assert "evaluate_loss" not in caplog.text


def test_paper_warns_where_weights_look_trained(caplog: pytest.LogCaptureFixture) -> None:
    for name in PRESETS:
        caplog.clear()
        PSSController(trained_gpt2(), PSSConfig.preset(name), evaluate_loss=lambda: 1.0)
        assert ("look trained" in caplog.text) == (name == "paper"), name
    caplog.clear()
    fresh = type(trained_gpt2())(trained_gpt2().config)
    PSSController(fresh, PSSConfig.preset("paper"))
    assert "look trained" not in caplog.text


def test_interventions_without_effect_cost_no_budget_and_no_cooldown() -> None:
    """False alarms must not use up what a real explosion needs."""
    model = trained_gpt2()
    config = PSSConfig.preset(
        "anchored",
        detectors=("grad_norm_ratio",),
        calibration_steps=1,
        max_interventions=1,
        cooldown_steps=5,
    )
    pss = PSSController(model, config, evaluate_loss=lambda: loss_of(model, ROWS))
    pss.step(1.0, update=lambda: None)
    for _ in range(3):
        (record,) = pss.step(9.0, update=lambda: None).records
        assert isinstance(record, Intervention)
        assert not record.has_changed_weights
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    with torch.no_grad():  # an explosion: σ₁ grows fivefold
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.add_(4 * s[0] * torch.outer(u[:, 0], vh[0]))
    report = pss.step(9.0, update=lambda: None)
    (record,) = report.records
    assert isinstance(record, Intervention)
    assert record.has_changed_weights
    assert report.scalars["interventions"] == 1
    (record,) = pss.step(9.0, update=lambda: None).records
    assert not isinstance(record, Intervention), "the cooldown, and the budget, count from here"


def test_a_record_that_cannot_be_measured_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pss = PSSController(trained_gpt2(), PSSConfig(), evaluate_loss=lambda: None)
    assert pss._anchors is not None
    healthy = pss._anchors.healthy

    def fail() -> dict[str, list[float]]:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(pss._measurements, "leading_values", fail)
    for _ in range(100):
        report = pss.step(1.0, update=lambda: None)
    assert [record.detector for record in report.records] == ["decomposition"]
    assert pss._anchors.healthy is healthy


def test_a_repair_without_a_record_warns_with_the_options_to_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pss = PSSController(trained_gpt2(), PSSConfig(), evaluate_loss=lambda: None)
    pss.smooth_now()
    assert "floor_reference='noise'" in caplog.text
    caplog.clear()
    pss.load_state_dict(pss.state_dict())
    pss.smooth_now()
    assert "no record of healthy weights" not in caplog.text


def test_options_of_a_trial_that_is_off_warn(caplog: pytest.LogCaptureFixture) -> None:
    config._warn_once.cache_clear()
    PSSConfig.preset("paper", trial_margin_ratio=0.1)
    PSSConfig.preset("floor", trial="spikes")
    assert caplog.text.count("has no effect") == 2
