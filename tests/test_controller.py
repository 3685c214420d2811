"""PSSController in a hand-written loop: judging and acting."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import pytest
import torch
from loops import Loop, changed, collapse_, make_model, stable_rank64
from torch import Tensor, nn

from hf_pss import ConfigurationError, NonFiniteError, PSSConfig, PSSController
from hf_pss.detection.detectors import Quantity, Verdict
from hf_pss.detection.policy import Action
from hf_pss.models.distributed import Backend
from hf_pss.records.events import Event, Intervention

SPIKE_CONFIG = PSSConfig.preset("paper", calibration_steps=2, cooldown_steps=0)


class TooLate(Backend):
    """As ZeRO: the update has happened when its norm is known."""

    can_hold_back: ClassVar[bool] = False


def test_three_lines_train_and_smooth_a_spike() -> None:
    loop = Loop(SPIKE_CONFIG)
    reports = [loop.step(factor) for factor in (1, 1, 1, 10)]
    verdicts = [report.verdict.value for report in reports]
    assert verdicts == ["calibrating", "calibrating", "normal", "spike"]
    (record,) = reports[-1].records
    assert isinstance(record, Intervention)
    assert {change.status for change in record.matrices} == {"smoothed"}
    assert all(c.sigma_after < c.sigma_before for c in record.matrices)
    assert reports[-1].scalars["interventions"] == 1
    assert reports[-1].scalars["threshold"] == pytest.approx(
        2.5 * reports[-1].scalars["baseline"], rel=1e-12
    )


def test_the_update_of_a_spike_is_applied_by_default_and_left_out_with_skip() -> None:
    for policy, applied in (("apply", True), ("skip", False)):
        loop = Loop(
            PSSConfig.preset("paper", calibration_steps=2, cooldown_steps=0, spike_update=policy)
        )
        for _ in range(3):
            loop.step()
        before = loop.weights()
        report = loop.step(10)
        matrices = {c.name.partition("[")[0] for c in report.records[0].matrices}
        others = set(before) - matrices
        assert report.update_applied is applied
        assert report.records[0].event.update_applied is applied
        assert matrices <= changed(before, loop.weights())
        # Norms and biases move by the optimizer only.
        assert bool(changed(before, loop.weights()) & others) is applied


def test_an_intervention_in_ones_own_loop_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop(SPIKE_CONFIG)
    for factor in (1, 1, 1, 10):
        loop.step(factor)
    (line,) = [r for r in caplog.records if "smoothing" in r.getMessage()]
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith("PSS, step 4: grad norm ")
    num_selected = len(loop.pss.stable_ranks())
    changed = f"smoothing (clip) changed {num_selected} of {num_selected} matrices"
    assert changed in line.getMessage()
    assert "the update was skipped" not in line.getMessage()


def test_when_skipping_parameters_are_named_from_the_second_bad_step_on() -> None:
    loop, named = Loop(PSSConfig.preset("paper")), []
    for _ in range(3):
        loop.optimizer.zero_grad()
        loop.model(loop.inputs).square().mean().backward()
        loop.model.get_parameter("layers.1.linear1.weight").grad[0, 0] = math.nan
        loop.pss.inspect_gradients()
        norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
        (event,) = loop.pss.step(norm, update=loop.optimizer.step).records
        named.append(event.fired)
    assert named == [(), *[("layers.1.linear1.weight",)] * 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_and_forgotten(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    loop, twin = Loop(SPIKE_CONFIG), Loop(SPIKE_CONFIG)
    for each in (loop, twin):
        for _ in range(3):
            each.step()
    before = loop.weights()
    report = loop.step(bad)
    assert changed(before, loop.weights()) == set()
    assert not report.update_applied
    assert report.verdict is Verdict.NON_FINITE
    assert report.records[0].update_applied is False
    assert "the update was skipped" in caplog.text
    assert report.scalars["nonfinite_steps"] == 1
    assert "grad_norm_preclip" not in report.scalars  # logs hold finite numbers only
    assert "Step 4 is not finite" in caplog.text
    assert [r.verdict for r in (loop.step(), twin.step())] == [Verdict.NORMAL] * 2
    assert loop.step(10).records[0].event.baseline == twin.step(10).records[0].event.baseline


def test_stop_comes_before_the_update_and_names_step_and_parameters() -> None:
    loop = Loop(PSSConfig.preset("paper", on_nonfinite="stop"))
    loop.step()
    loop.optimizer.zero_grad()
    (loop.model(loop.inputs)).square().mean().backward()
    loop.model.get_parameter("layers.1.linear1.weight").grad[0, 0] = math.nan
    before = loop.weights()
    loop.pss.inspect_gradients()
    norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)  # spreads NaN everywhere
    with pytest.raises(NonFiniteError, match=r"before the update of step 2.*layers\.1\.linear1"):
        loop.pss.step(norm, update=loop.optimizer.step)
    assert changed(before, loop.weights()) == set()
    (event,) = loop.pss.pending_records
    assert isinstance(event, Event)
    assert (event.decision, event.fired) == (Action.STOP, ("layers.1.linear1.weight",))


def test_without_inspection_before_clipping_no_parameter_is_named() -> None:
    loop = Loop(PSSConfig.preset("paper", on_nonfinite="stop"))
    with pytest.raises(NonFiniteError) as stopped:
        loop.step(math.nan)  # clipping has made every gradient NaN
    assert "first in" not in str(stopped.value)


def test_a_non_finite_loss_counts_with_finite_gradients() -> None:
    loop = Loop(PSSConfig.preset("paper"))
    _, norm = loop.backward()
    before = loop.weights()
    report = loop.pss.step(norm, update=loop.optimizer.step, loss=math.nan)
    assert (report.update_applied, report.scalars["nonfinite_steps"]) == (False, 1)
    assert (report.records[0].detector, changed(before, loop.weights())) == ("loss", set())


def test_a_long_streak_of_non_finite_steps_stops() -> None:
    loop = Loop(PSSConfig.preset("paper", max_nonfinite_streak=3))
    loop.step(math.nan), loop.step(math.nan), loop.step()  # a finite step ends the streak
    loop.step(math.nan), loop.step(math.nan)
    with pytest.raises(NonFiniteError, match="3 non-finite steps in a row"):
        loop.step(math.nan)


def test_overflows_are_left_to_the_loss_scaler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_pss")
    config = PSSConfig.preset("paper", detectors=("update_norm_ratio",), on_nonfinite="stop")
    loop = Loop(config)
    assert loop.pss.before_update(math.inf, 1.0, loss_scaled=True)  # the scaler's step runs
    report = loop.pss.after_update()
    assert not report.update_applied
    assert report.scalars["nonfinite_steps"] == 1
    assert report.verdict is Verdict.NON_FINITE  # no update norm of zero was learned
    (record,) = [r for r in caplog.records if "left to the loss scaler" in r.message]
    assert record.levelno == logging.INFO
    # A NaN loss with finite gradients is not what the scaler looks at.
    with pytest.raises(NonFiniteError):
        loop.pss.before_update(1.0, math.nan, loss_scaled=True)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_discarded_update_is_recorded_as_discarded(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeed drops it before anybody is asked: nothing is damaged, and nothing held back."""
    loop = Loop(PSSConfig.preset("paper"))
    loop.pss = PSSController(
        loop.model, PSSConfig.preset("paper", on_nonfinite=policy), backend=TooLate()
    )
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=r"before the update .* No weight was touched"):
            loop.pss.before_update(math.inf, 1.0, discarded=True)
        return
    assert loop.pss.before_update(math.inf, 1.0, discarded=True)
    report = loop.pss.after_update()
    assert (report.update_applied, report.scalars["nonfinite_steps"]) == (False, 1)
    assert "its update was discarded by DeepSpeed, no weight was touched" in caplog.text
    with pytest.raises(NonFiniteError, match=r"after the update .* damaged"):
        loop.pss.before_update(math.inf, 1.0)


def test_a_streak_of_overflows_stops_even_under_a_loss_scaler() -> None:
    loop = Loop(PSSConfig.preset("paper", max_nonfinite_streak=2))
    loop.pss.before_update(math.nan, loss_scaled=True)
    loop.pss.after_update()
    with pytest.raises(NonFiniteError, match="in a row"):
        loop.pss.before_update(math.nan, loss_scaled=True)


def test_weights_that_an_update_made_non_finite_stop_after_it() -> None:
    loop = Loop(PSSConfig.preset("paper", detectors=("update_norm_ratio",), on_nonfinite="stop"))
    _, norm = loop.backward()

    def break_a_weight() -> None:
        with torch.no_grad():
            loop.model.get_parameter("layers.0.linear1.weight")[0, 0] = math.inf

    with pytest.raises(NonFiniteError, match=r"Stopped after the update of step 1.*damaged"):
        loop.pss.step(norm, update=break_a_weight)
    assert len(loop.pss.pending_records) == 1


def test_norms_may_be_tensors_floats_or_none() -> None:
    config = PSSConfig.preset("paper", calibration_steps=1)
    loop = Loop(config)
    loop.backward()
    forms: list[Any] = [
        torch.tensor(2.0),
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.bfloat16),
        2.0,
        2,
    ]
    for form in forms:
        report = loop.pss.step(form, update=lambda: None, loss=torch.tensor(1.0))
        assert report.scalars["grad_norm_preclip"] == 2.0
    report = loop.pss.step(None, update=lambda: None)
    assert report.verdict is Verdict.NORMAL
    assert "grad_norm_preclip" not in report.scalars


def test_a_loop_that_calls_step_for_each_micro_batch_is_warned_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Accelerate's clip_grad_norm_ returns None between the boundaries of an accumulation."""
    norms = [None, None, None, 1.0]
    for given, num_warnings in ((norms * 2, 1), (norms[::-1], 1), ([None] * 3, 0), ([1.0] * 3, 0)):
        pss = PSSController(make_model(), PSSConfig.preset("paper"))
        caplog.clear()
        for norm in given:
            pss.step(norm, update=lambda: None)
        assert caplog.text.count("if accelerator.sync_gradients") == num_warnings
    pss = PSSController(make_model(), PSSConfig.preset("paper"), speaks=False)
    caplog.clear()
    for norm in norms:
        pss.step(norm, update=lambda: None)
    assert caplog.text == ""


def test_one_read_brings_all_numbers_to_the_host() -> None:
    class Counting(Backend):
        reads = 0

        def agree(self, values: Tensor) -> list[float]:
            type(self).reads += 1
            return values.tolist()

    pss = PSSController(make_model(), PSSConfig.preset("paper"), backend=Counting())
    Counting.reads = 0
    numbers = pss.to_host(torch.tensor(1.5), None, torch.tensor([2.5]), 3.5)
    assert (numbers, Counting.reads) == ([1.5, None, 2.5, 3.5], 1)
    assert pss.to_host(1.0, None) == [1.0, None]
    assert Counting.reads == 1


@pytest.mark.parametrize("speaks", [True, False])
def test_smooth_on_resume_warns_in_a_loop_without_a_trainer(
    speaks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the Trainer's callback can honour it; the callback builds its controller silently."""
    PSSController(make_model(), PSSConfig(smooth_on_resume=True), speaks=speaks)
    assert ("Call smooth_now() once after load_state_dict()" in caplog.text) is speaks


# ---- which matrices ----


def test_scope_fired_changes_only_the_matrix_that_fired() -> None:
    config = PSSConfig.preset(
        "paper",
        detectors=("matrix_grad_norm_ratio",),
        scope="fired",
        spike_update="skip",
        calibration_steps=2,
        cooldown_steps=0,
    )
    loop = Loop(config)
    for _ in range(3):
        loop.step()
    loop.backward()
    loop.model.get_parameter("layers.1.linear2.weight").grad *= 100
    norm = nn.utils.clip_grad_norm_(loop.model.parameters(), math.inf)
    before = loop.weights()
    report = loop.pss.step(norm, update=loop.optimizer.step)
    assert [c.name for c in report.records[0].matrices] == ["layers.1.linear2.weight"]
    assert changed(before, loop.weights()) == {"layers.1.linear2.weight"}


def test_observing_reports_and_touches_nothing() -> None:
    loop, twin = (
        Loop(PSSConfig.preset("paper", calibration_steps=2, observe_only=True)),
        Loop(PSSConfig.preset("paper")),
    )
    report = [loop.step(factor) for factor in (1, 1, 1, 10)][-1]
    for factor in (1, 1, 1, 10):
        twin.step(factor)
    assert (report.verdict, report.records[0].decision) == (Verdict.SPIKE, Action.OBSERVE)
    assert report.scalars["interventions"] == 0
    assert changed(loop.weights(), twin.weights()) == set()
    assert loop.step(math.nan).update_applied  # asked not to touch an update, it does not


def test_without_detectors_the_guard_needs_no_matrix() -> None:
    for detectors in ((), ("grad_norm_ratio",), ("stable_rank_floor",)):
        pss = PSSController(nn.Linear(3, 1), PSSConfig.preset("paper", detectors=detectors))
        report = pss.step(1.0, update=lambda: None)
        assert report.verdict in (Verdict.NORMAL, Verdict.CALIBRATING)
        assert not pss.step(math.nan, update=lambda: None).update_applied


# ---- the stable-rank floor ----

# Worst relative shortfall below the floor over 20 seeds, five shapes and four collapses: 1.13e-5.
FLOOR_TOLERANCE = 3e-5


def test_the_floor_restores_the_stable_rank_of_a_collapsed_matrix() -> None:
    config = PSSConfig.preset("floor", check_every_steps=1, floor_ratio=0.8)
    loop = Loop(config)
    name = "layers.0.linear1.weight"
    weight = loop.model.get_parameter(name)
    collapse_(weight, 20.0)
    before, parameters = stable_rank64(weight), loop.weights()
    assert before < 1.1
    report = loop.pss.step(1.0, update=lambda: None)
    (record,) = report.records
    assert [(c.name, c.status) for c in record.matrices] == [(name, "smoothed")]
    floor = record.event.threshold
    assert before < floor * (1 - FLOOR_TOLERANCE) <= stable_rank64(weight)
    assert changed(parameters, loop.weights()) == {name}


def test_the_floor_of_the_start_spares_a_model_that_starts_low() -> None:
    config = PSSConfig.preset("floor", check_every_steps=1, floor_ratio=0.9)
    model = make_model()
    for _, p in model.named_parameters():
        if p.ndim == 2:
            collapse_(p, 30.0)
    pss = PSSController(model, config)
    assert pss.step(1.0, update=lambda: None).records == ()
    noise = PSSController(
        model, PSSConfig.preset("floor", check_every_steps=1, floor_reference="noise")
    )
    assert len(noise.step(1.0, update=lambda: None).records) == 1  # the check can fail


def test_a_zero_matrix_is_left_alone_and_does_not_lower_its_floor() -> None:
    model = make_model()
    weight = model.get_parameter("layers.0.linear2.weight")
    initial = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    pss = PSSController(model, PSSConfig.preset("floor", check_every_steps=1))
    assert pss.step(1.0, update=lambda: None).records == ()
    assert not weight.any()
    with torch.no_grad():
        weight.copy_(initial)
    collapse_(weight, 20.0)
    (record,) = pss.step(1.0, update=lambda: None).records
    assert [change.name for change in record.matrices] == ["layers.0.linear2.weight"]


def test_the_floor_is_checked_at_its_rhythm() -> None:
    # An observer: once they are capped, matrices that nobody trains stay at their floor.
    config = PSSConfig.preset(
        "floor", check_every_steps=3, floor_ratio=1.5, floor_reference="noise", observe_only=True
    )
    loop = Loop(config)
    acted = [bool(loop.pss.step(1.0, update=lambda: None).records) for _ in range(6)]
    assert acted == [False, False, True, False, False, True]


# ---- several detectors, and several matrices, in one check ----

LOW, FALLING = "layers.0.linear1.weight", "layers.1.linear2.weight"
FLOOR_AND_DROP = ("stable_rank_floor", "stable_rank_drop")


def watch_stable_ranks(detectors: tuple[str, ...], **options: Any) -> PSSConfig:
    return PSSConfig.preset(
        "paper",
        detectors=detectors,
        check_every_steps=1,
        calibration_steps=2,
        floor_ratio=0.4,
        stable_rank_drop=0.25,
        scope="fired",
        **options,
    )


@pytest.mark.parametrize("detectors", [FLOOR_AND_DROP, FLOOR_AND_DROP[::-1]])
def test_floor_and_drop_both_act_in_their_order(detectors: tuple[str, ...]) -> None:
    loop = Loop(watch_stable_ranks(detectors))
    for _ in range(3):  # a run too hot: at every check one matrix lies below its floor
        collapse_(loop.model.get_parameter(LOW), 30.0)
        (record,) = loop.pss.step(1.0, update=lambda: None).records
        assert record.event.fired == (LOW,)
    collapse_(loop.model.get_parameter(LOW), 30.0)
    collapse_(loop.model.get_parameter(FALLING), 1.5)
    before = loop.weights()
    report = loop.pss.step(1.0, update=lambda: None)
    assert [type(record) for record in report.records] == [Intervention] * 2
    assert tuple(record.event.detector for record in report.records) == detectors
    fired = {record.event.detector: record.event.fired for record in report.records}
    assert fired == {"stable_rank_floor": (LOW,), "stable_rank_drop": (FALLING,)}
    assert changed(before, loop.weights()) == {LOW, FALLING}
    assert report.scalars["interventions"] == 5


def test_a_drop_that_waits_for_its_cooldown_leaves_the_floor_free() -> None:
    loop = Loop(watch_stable_ranks(FLOOR_AND_DROP[::-1], cooldown_steps=50))
    for _ in range(3):
        loop.pss.step(1.0, update=lambda: None)
    collapse_(loop.model.get_parameter(FALLING), 1.5)
    loop.pss.step(1.0, update=lambda: None)
    collapse_(loop.model.get_parameter(FALLING), 1.5)
    collapse_(loop.model.get_parameter(LOW), 30.0)
    observed, acted = loop.pss.step(1.0, update=lambda: None).records
    assert (observed.detector, observed.reason) == ("stable_rank_drop", "cooldown")
    assert acted.event.fired == (LOW,)


def test_a_spectral_norm_that_grows_fires_for_its_matrix_alone() -> None:
    loop = Loop(
        PSSConfig.preset(
            "paper",
            detectors=("spectral_norm_ratio",),
            scope="fired",
            check_every_steps=2,
            calibration_steps=2,
        )
    )
    weight = loop.model.get_parameter(FALLING)
    for _ in range(4):
        assert not loop.pss.step(1.0, update=lambda: None).records
    collapse_(weight, 1.5)
    before = loop.weights()
    assert not loop.pss.step(1.0, update=lambda: None).records  # between two looks
    (record,) = loop.pss.step(1.0, update=lambda: None).records
    assert (record.event.detector, record.event.fired) == ("spectral_norm_ratio", (FALLING,))
    assert record.event.value == pytest.approx(1.5 * record.event.baseline, rel=1e-5)
    assert changed(before, loop.weights()) == {FALLING}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_broken_matrix_leaves_the_guard_of_all_others_on(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(watch_stable_ranks(FLOOR_AND_DROP))
    broken = "layers.0.linear2.weight"
    for _ in range(3):
        loop.pss.step(1.0, update=lambda: None)
    with torch.no_grad():
        loop.model.get_parameter(broken)[0, 0] = bad
    collapse_(loop.model.get_parameter(LOW), 30.0)
    collapse_(loop.model.get_parameter(FALLING), 1.5)
    report = loop.pss.step(1.0, update=lambda: None)
    seen, floor, drop = report.records
    assert (seen.detector, seen.fired, seen.kind.value) == ("stable_rank", (broken,), "non_finite")
    # The update had happened: there is none to skip, and the record does not say so.
    assert (seen.decision, seen.reason) == (Action.OBSERVE, "after the update")
    assert report.update_applied
    assert (LOW in floor.event.fired, drop.event.fired) == (True, (LOW, FALLING))
    assert broken not in {change.name for change in floor.matrices + drop.matrices}
    assert (report.verdict, report.scalars["nonfinite_steps"]) == (Verdict.NON_FINITE, 1)
    assert f"first in {broken}: observed (after the update)" in caplog.text


def test_an_update_norm_that_is_not_finite_is_observed_after_the_update() -> None:
    loop = Loop(PSSConfig.preset("paper", detectors=("update_norm_ratio",)))

    def break_a_weight() -> None:
        with torch.no_grad():
            loop.model.get_parameter(LOW)[0, 0] = math.inf

    (seen,) = loop.pss.step(1.0, update=break_a_weight).records
    assert (seen.detector, seen.decision) == ("update_norm", Action.OBSERVE)


def test_scaled_floors_act_at_their_scale_and_are_not_measured_at_zero() -> None:
    loop = Loop(PSSConfig.preset("floor", floor_reference="noise", check_every_steps=1))
    acts = []
    for factor in (1.0, 2.0, 0.0, 2.5):
        loop.pss.scale_floors(factor)
        acts.append(len(loop.step().records))
        assert loop.pss._triggers.reads(Quantity.STABLE_RANK) is (factor > 0)
    assert acts == [0, 1, 0, 1]
    loop.pss.load_state_dict(loop.pss.state_dict())
    assert loop.pss._triggers.floors == Loop(loop.pss.config).pss._triggers.floors


def test_scaled_floors_leave_other_detectors_as_they_are() -> None:
    loop = Loop(PSSConfig.preset("anchored", calibration_steps=2))
    for _ in range(3):
        loop.step()
    before = loop.pss.state_dict()
    loop.pss.scale_floors(0.0)
    assert loop.pss.state_dict() == before


@pytest.mark.parametrize("factor", [-1.0, math.inf, math.nan])
def test_a_factor_of_floors_is_a_finite_number(factor: float) -> None:
    with pytest.raises(ConfigurationError, match="finite number >= 0"):
        Loop(PSSConfig()).pss.scale_floors(factor)
