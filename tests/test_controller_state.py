"""What the controller saves, loads and refuses to load; and that it is deterministic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
from helpers import ALL_DETECTORS
from loops import Loop, changed, collapse_, make_model
from torch import nn

from hf_pss import PSSConfig, PSSController, StateError
from hf_pss.detection.detectors import Verdict

Damage: TypeAlias = Callable[[dict[str, Any]], Any]


EVERYTHING = PSSConfig.preset(
    "paper",
    detectors=ALL_DETECTORS,
    calibration_steps=2,
    check_every_steps=2,
    cooldown_steps=1,
)


def test_a_saved_state_is_strict_json_and_continues_exactly() -> None:
    loop = Loop(EVERYTHING)
    for factor in (1, 1, 1, 10, math.nan, 1):
        loop.step(factor)
    saved = json.dumps(loop.pss.state_dict(), allow_nan=False)
    again = PSSController(loop.model, EVERYTHING)
    again.load_state_dict(json.loads(saved))
    assert again.state_dict() == loop.pss.state_dict()
    assert (again.state_dict() == PSSController(loop.model, EVERYTHING).state_dict()) is False


def test_the_same_steps_give_the_same_run_and_leave_the_global_generator_alone() -> None:
    runs = []
    for _ in range(2):
        loop = Loop(EVERYTHING)
        generator = torch.get_rng_state()
        for factor in (1, 1, 1, 10, 1, 1):
            loop.step(factor)
        assert torch.equal(torch.get_rng_state(), generator)
        runs.append(loop)
    assert changed(runs[0].weights(), runs[1].weights()) == set()
    assert runs[0].pss.state_dict() == runs[1].pss.state_dict()


def _set(key: str, value: Any) -> Damage:
    return lambda state: {**state, key: value}


def _drop(key: str) -> Damage:
    return lambda state: {k: v for k, v in state.items() if k != key}


def damages() -> Iterator[Any]:
    keys = (
        "version",
        "matrices",
        "step",
        "history",
        "watched",
        "starting_ranks",
        "detectors",
    )
    for key in keys:
        yield pytest.param(_drop(key), id=f"no {key}")
        for value in (None, "garbage", -1, math.nan, [1], {}, {"version": 7}):
            if (key, value) != ("starting_ranks", {}):  # what floors that refer to noise save
                yield pytest.param(_set(key, value), id=f"{key}={value}")
    yield pytest.param(_set("version", 99), id="newer")
    yield pytest.param(_set("version", True), id="version is a truth value")
    yield pytest.param(_set("unknown", 1), id="unknown key")
    yield pytest.param(_set("starting_ranks", {"w": 3.0}), id="ranks of another model")
    for value in (None, 3, "garbage", [], {}):
        yield pytest.param(lambda state, value=value: value, id=f"{value!r} for all")


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Damage) -> None:
    loop = Loop(EVERYTHING)
    for factor in (1, 1, 1, 10):
        loop.step(factor)
    before = loop.pss.state_dict()
    with pytest.raises(StateError):
        loop.pss.load_state_dict(damage(json.loads(json.dumps(before))))
    assert loop.pss.state_dict() == before


def test_a_state_of_other_matrices_is_refused() -> None:
    saved = Loop(PSSConfig.preset("paper")).pss.state_dict()
    with pytest.raises(StateError, match="different weight matrices"):
        Loop(PSSConfig.preset("paper", roles=("mlp",))).pss.load_state_dict(saved)


def test_new_detectors_start_fresh_and_shared_ones_continue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = Loop(PSSConfig.preset("paper"))
    for _ in range(3):
        before.step(1.0)
    saved = before.pss.state_dict()
    both = Loop(PSSConfig.preset("anchored")).pss
    fresh_floors = both.state_dict()["starting_ranks"]
    both.load_state_dict(saved)
    after = both.state_dict()
    assert (
        "detectors are grad_norm_ratio, those of this run grad_norm_ratio, stable_rank_floor"
        in (caplog.text)
    )
    assert (after["step"], after["history"]) == (3, saved["history"])
    shared = "grad_norm_ratio"
    learned = saved["detectors"]["detectors"][shared]
    assert after["detectors"]["detectors"][shared] == learned
    assert after["starting_ranks"] == fresh_floors


def test_a_floor_ratio_given_at_resume_applies_to_the_saved_starting_ranks() -> None:
    loop = Loop(PSSConfig.preset("floor", floor_ratio=0.4, check_every_steps=1))
    saved = loop.pss.state_dict()
    collapse_(loop.model.get_parameter("layers.0.linear1.weight"), 3.0)
    low, high = (
        PSSController(loop.model, PSSConfig.preset("floor", floor_ratio=ratio, check_every_steps=1))
        for ratio in (0.05, 0.9)
    )
    records = []
    for pss in (low, high):
        pss.load_state_dict(saved)
        records.append(len(pss.step(1.0, update=lambda: None).records))
    assert records == [0, 1]


def test_reset_forgets_all_but_the_floors() -> None:
    loop = Loop(EVERYTHING)
    ranks = loop.pss.state_dict()["starting_ranks"]
    for factor in (1, 1, 1, 10):
        loop.step(factor)
    loop.pss.reset(step_number=40)
    state = loop.pss.state_dict()
    assert (state["step"], state["starting_ranks"]) == (40, ranks)
    assert state["history"] == PSSController(make_model(), EVERYTHING).state_dict()["history"]
    assert loop.step().verdict is Verdict.CALIBRATING


def test_the_same_model_under_another_wrapper_keeps_its_state() -> None:
    loop = Loop(EVERYTHING)
    loop.step()
    wrapped = PSSController(nn.DataParallel(loop.model), EVERYTHING)
    wrapped.load_state_dict(loop.pss.state_dict())
    assert wrapped.step_number == 1


@pytest.mark.parametrize("first", ["start", "noise"])
def test_floors_of_a_resumed_run_follow_its_own_floor_reference(first: str) -> None:
    """A rescue refers to noise where the damaged run referred to its start; and back."""
    second = {"start": "noise", "noise": "start"}[first]
    loop = Loop(PSSConfig.preset("floor", floor_reference=first))
    for name in ("linear1", "linear2"):
        collapse_(loop.model.get_parameter(f"layers.0.{name}.weight"), 3.0)
    saved = PSSController(loop.model, PSSConfig.preset("floor", floor_reference=first)).state_dict()
    fresh, resumed = (
        PSSController(loop.model, PSSConfig.preset("floor", floor_reference=second)) for _ in "ab"
    )
    resumed.load_state_dict(saved)
    assert resumed._triggers.floors == fresh._triggers.floors


def test_a_repeated_detector_is_a_damaged_state() -> None:
    loop = Loop(PSSConfig.preset("paper"))
    state = loop.pss.state_dict()
    with pytest.raises(StateError, match="damaged"):
        loop.pss.load_state_dict({**state, "watched": ["grad_norm_ratio"] * 2})
