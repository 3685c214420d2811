"""When interventions have failed: the rules, on plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from hf_pss.detection.explosion import FailedInterventions, TrainingFailure


def failures(
    losses: Iterable[float | None], interventions: set[int], *, window: int = 10, most: int = 2
) -> list[tuple[int, int]]:
    counter = FailedInterventions(window_steps=window, max_failed=most)
    seen = [
        counter.update(step, loss=loss, has_intervened=step in interventions)
        for step, loss in enumerate(losses, start=1)
    ]
    return [(one.onset_step, one.step) for one in seen if one is not None]


def test_interventions_within_one_window_have_failed() -> None:
    assert failures([3.0] * 60, {20, 25, 30}) == [(20, 30)]
    assert failures([3.0] * 60, {20, 30, 40}) == [(20, 40)]


def test_interventions_farther_apart_than_the_window_have_helped() -> None:
    assert failures([3.0] * 100, {20, 31, 42, 53}) == []


def test_a_loss_that_stays_high_counts_again_with_every_window() -> None:
    losses = [3.0] * 30 + [4.0] * 100
    assert failures(losses, {30}, most=2) == [(30, 50)]
    assert failures([3.0] * 30 + [3.3] * 100, {30}) == []


def test_a_window_that_ends_well_resets_the_count() -> None:
    assert failures([3.0] * 100, {20, 25, 60, 65}, most=2) == []
    assert failures([3.0] * 100, {20, 25, 60, 65, 70}, most=2) == [(60, 70)]


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_missing_and_nonfinite_losses_do_not_count(loss: float | None) -> None:
    losses = [3.0] * 30 + [loss] * 100
    assert failures(losses, {30}) == []


def test_without_an_earlier_loss_only_repetition_counts() -> None:
    counter = FailedInterventions(window_steps=2, max_failed=1)
    assert counter.update(1, loss=9.0, has_intervened=True) is None
    failure = counter.update(2, loss=9.0, has_intervened=True)
    assert failure == TrainingFailure(
        1, 2, "1 interventions in a row failed since step 1", None, 9.0
    )


def test_interventions_without_effect_fail_only_if_the_loss_stays_high() -> None:
    """Noisy batches of a sound fine-tuning raise alarms that leave the weights alone."""

    def failed(losses: list[float], *, changed: bool) -> list[int]:
        counter = FailedInterventions(window_steps=10, max_failed=2)
        found = (
            counter.update(step, loss=loss, has_intervened=step >= 30, has_changed_weights=changed)
            for step, loss in enumerate(losses, start=1)
        )
        return [failure.step for failure in found if failure is not None]

    assert failed([3.0] * 100, changed=False) == []
    assert failed([3.0] * 100, changed=True) != []
    assert failed([3.0] * 30 + [5.0] * 70, changed=False) != []
