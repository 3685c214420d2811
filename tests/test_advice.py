from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.records.events import Event, EventKind, Intervention, MatrixChange, Record
from hf_pss.records.messages import (
    AlertLevel,
    Alerts,
    alert_of,
    card_section,
    describe_intervention,
    overall_advice,
)

DETECTORS = {
    EventKind.SPIKE: "matrix_grad_norm_ratio",
    EventKind.DROP: "stable_rank_drop",
    EventKind.FLOOR: "stable_rank_floor",
    EventKind.NON_FINITE: "grad_norm_ratio",
    EventKind.RESUME: "resume",
    EventKind.FAILURE: "failure",
    EventKind.ERROR: "save",
}


def event(
    kind: EventKind, action: Action, reason: str = "", *, step: int = 123_456, value: float = 9.0
) -> Event:
    verdict = Verdict.NON_FINITE if kind is EventKind.NON_FINITE else Verdict.SPIKE
    names = ("a", "b", "c", "d")
    judgement = Judgement(verdict, DETECTORS[kind], names, value, 1.0, 2.5)
    event = Event.of(judgement, Decision(action, reason), step=step, loss=math.nan)
    return replace(event, kind=kind)


def intervention(kind: EventKind) -> Intervention:
    return Intervention(
        event=event(kind, Action.ACT),
        smoothing="clip",
        seconds=0.1,
        matrices=(MatrixChange("w", (4, 4), "smoothed"),),
    )


def test_an_intervention_says_how_many_matrices_there_are_in_all() -> None:
    record = replace(intervention(EventKind.FLOOR), num_selected=28)
    assert "smoothing (clip) changed 1 of 28 matrices" in describe_intervention(record)


def test_a_trial_says_whose_loss_it_compares() -> None:
    tried = replace(intervention(EventKind.SPIKE), loss_before=52.24, loss_after=45.85)
    text = describe_intervention(tried)
    assert "; the loss of the trial's micro-batch went from 52.24 to 45.85." in text


@pytest.mark.parametrize(("applied", "is_said"), [(False, True), (True, False), (None, False)])
def test_an_intervention_says_if_the_update_was_skipped(
    applied: bool | None, is_said: bool
) -> None:
    record = intervention(EventKind.SPIKE)
    record = replace(record, event=replace(record.event, update_applied=applied))
    assert ("the update was skipped" in describe_intervention(record)) == is_said


def test_the_advice_is_that_of_the_worst_event_and_leads_to_the_rescue_of_many_spikes() -> None:
    floor = intervention(EventKind.FLOOR)
    spikes = [event(EventKind.SPIKE, Action.OBSERVE, step=step) for step in (21, 22, 23)]
    assert "routine" in overall_advice([floor, floor], "runs/a")
    one = overall_advice([spikes[0], floor], "runs/a")
    assert one.startswith("Step 21: Watch the loss")
    assert "rescue" not in one
    many = overall_advice([*spikes, floor], "runs/a")
    assert many.startswith("Step 23: ")  # the newest of equally bad ones
    assert many.endswith(
        "3 of the last 4 events are spikes, drops, failures or steps that were not finite. To see "
        "what went wrong and where you can continue, call hf-pss rescue runs/a."
    )
    stop = event(EventKind.NON_FINITE, Action.STOP, step=24)
    assert overall_advice([*spikes, stop, spikes[0]], "a").startswith("Step 24: The run has ended")


def test_the_model_card_groups_events_by_kind_and_response() -> None:
    events = [event(EventKind.FLOOR, Action.ACT, step=step) for step in (5, 10, 20)]
    card = card_section("preset floor", [*events, event(EventKind.SPIKE, Action.OBSERVE, step=12)])
    assert "trained with hf_pss (preset floor)" in card
    assert "- rank floor, smoothed: 3 ×, between steps 5 and 20\n" in card
    assert "- spike, observed: 1 ×, between steps 12 and 12\n" in card
    assert "It recorded no event." in card_section("preset floor", [])


@pytest.mark.parametrize("kind", EventKind)
@pytest.mark.parametrize("action", Action)
def test_every_record_has_words(kind: EventKind, action: Action) -> None:
    records: list[Record] = [event(kind, action, "why"), intervention(kind)]
    for record in records:
        alert = alert_of(record)
        assert len(alert.title) < 64  # W&B's limit
        assert "123456" in alert.title
        assert alert.happened
        assert alert.done
        assert alert.advice
        assert alert.text.count("  ") == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_numbers_appear_in_the_text(value: float) -> None:
    for kind in EventKind:
        assert str(value) in alert_of(event(kind, Action.OBSERVE, value=value)).text or (
            kind in (EventKind.RESUME, EventKind.FAILURE, EventKind.ERROR)
        )


def test_names_are_bounded() -> None:
    assert alert_of(event(EventKind.SPIKE, Action.OBSERVE)).happened.endswith(
        " in a, b, c and 1 more."
    )


def test_a_stop_is_an_error_and_upkeep_is_information() -> None:
    assert alert_of(event(EventKind.NON_FINITE, Action.STOP)).level is AlertLevel.ERROR
    assert alert_of(event(EventKind.FAILURE, Action.ROLL_BACK)).level is AlertLevel.ERROR
    assert alert_of(intervention(EventKind.SPIKE)).level is AlertLevel.WARN
    assert alert_of(intervention(EventKind.FLOOR)).level is AlertLevel.INFO


def test_advice_on_an_observed_event_names_the_option() -> None:
    for reason, option in (
        ("observe only", "observe_only"),
        ("cooldown", "cooldown_steps"),
        ("budget", "max_interventions"),
    ):
        assert option in alert_of(event(EventKind.SPIKE, Action.OBSERVE, reason)).advice


def test_a_nonfinite_step_is_not_smoothed() -> None:
    """PSS would skip it or end the run, so the advice must not mention smoothing."""
    told = alert_of(event(EventKind.NON_FINITE, Action.OBSERVE, "observe only")).advice
    assert "observe_only=False" in told
    assert "on_nonfinite" in told
    assert "smooth" not in told


def test_a_failure_without_interventions_is_described_by_its_reason() -> None:
    reason = "the run was to stop at a step that was not finite; back to checkpoint-5"
    record = event(EventKind.FAILURE, Action.ROLL_BACK, reason, step=9)
    alert = alert_of(replace(record, loss=None, baseline=None, value=None))
    assert alert.title == "PSS, step 9: training failed, rolled back"
    assert alert.happened == "Step 9: the run was to stop at a step that was not finite."
    assert "back to checkpoint-5" in alert.done
    assert "None" not in alert.text
    assert "moothing" not in alert.text


def test_losses_have_three_digits() -> None:
    record = replace(event(EventKind.FAILURE, Action.STOP, step=9), loss=7.123456789, baseline=2.5)
    assert "loss 7.12 against 2.5 before" in alert_of(record).happened
    broken = replace(event(EventKind.NON_FINITE, Action.SKIP_UPDATE), loss=7.123456789, fired=())
    assert alert_of(broken).happened.endswith("not finite (grad norm = 9, loss 7.12).")
    unknown = replace(broken, detector="checkpoint", value=None, loss=None)
    assert alert_of(unknown).happened.endswith("not finite (checkpoint).")


def test_frequent_alerts_are_thinned() -> None:
    alerts = Alerts()
    floor = [alerts.of(intervention(EventKind.FLOOR)) for _ in range(100)]
    assert [n for n, alert in enumerate(floor, 1) if alert] == [1, 2, 3, 10, 100]
    spikes = [alerts.of(intervention(EventKind.SPIKE)) for _ in range(20)]
    assert all(spikes)
    assert all(alerts.of(event(EventKind.NON_FINITE, Action.STOP)) for _ in range(20))
    assert all(alerts.of(event(EventKind.FAILURE, Action.ROLL_BACK)) for _ in range(20))


def test_alerts_report_interventions_without_effect_or_taken_back() -> None:
    idle = replace(
        intervention(EventKind.SPIKE), matrices=(MatrixChange("w", (4, 4), "unchanged"),)
    )
    assert alert_of(idle).done == "PSS: smoothing (clip) changed 0 of 1 matrix in 0.10 s."
    alerts = Alerts()
    told = [alerts.of(idle) for _ in range(20)]
    assert sum(alert is not None for alert in told) == 4, "the 1st, 2nd, 3rd and 10th"
    undone = replace(
        intervention(EventKind.SPIKE),
        event=event(EventKind.SPIKE, Action.UNDO, "there was no loss to try it on"),
    )
    assert "taken back: there was no loss to try it on." in alert_of(undone).done
    assert alert_of(undone).title.endswith("taken back")
