"""PSSConfig: words, ranges, presets; a bad option is refused when it is given."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from hf_pss import PRESETS, ConfigurationError, PSSConfig, RecoveryConfig, config
from hf_pss.detection.detectors import DETECTORS
from hf_pss.linalg import SMOOTHING_FUNCTIONS

BAD = [
    {"detectors": ("no_such",)},
    {"detectors": 3},
    {"detectors": (1,)},
    {"threshold_ratio": 1.0},
    {"threshold_ratio": math.nan},
    {"threshold_ratio": math.inf},
    {"threshold_ratio": "2.5"},
    {"threshold_ratio": True},
    {"baseline_alpha": 0.0},
    {"baseline_alpha": 1.5},
    {"calibration_steps": 0},
    {"calibration_steps": 1.5},
    {"patience_steps": 0},
    {"floor_ratio": 0},
    {"floor_reference": "beginning"},
    {"stable_rank_drop": 1.0},
    {"check_every_steps": 0},
    {"smoothing": "blur"},
    {"smoothing": None},
    {"max_rank": 0},
    {"scope": "some"},
    {"spike_update": "drop"},
    {"cooldown_steps": -1},
    {"max_interventions": -1},
    {"max_interventions": True},
    {"on_nonfinite": "ignore"},
    {"max_nonfinite_streak": 0},
    {"roles": ("embedding",)},
    {"include": [3]},
    {"health_every_steps": -1},
    {"keep_frobenius": "yes"},
    {"observe_only": "false"},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_a_bad_option_is_refused_and_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=name):
        PSSConfig(**options)
    with pytest.raises(ValueError, match=name):
        PSSConfig.preset("anchored", **options)


def test_whoever_only_observes_smooths_nothing_on_resume() -> None:
    with pytest.raises(ConfigurationError, match="set one of them to false"):
        PSSConfig(observe_only=True, smooth_on_resume=True)


def test_presets_are_what_their_names_say() -> None:
    assert {name: PSSConfig.preset(name).detectors for name in PRESETS} == {
        "paper": ("grad_norm_ratio",),
        "floor": ("stable_rank_floor",),
        "anchored": ("grad_norm_ratio", "stable_rank_floor"),
    }
    assert PSSConfig.preset() == PSSConfig() == PSSConfig.preset("anchored")
    assert PSSConfig().threshold_ratio == 2.5  # the one number that the paper gives


def test_unknown_presets_and_options_list_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match="anchored, floor, paper"):
        PSSConfig.preset("papers")
    with pytest.raises(ConfigurationError, match=r"no option tau\. It has .*threshold_ratio"):
        PSSConfig.preset("paper", tau=3.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pss_spike_update",
            "no option pss_spike_update. Its name here is spike_update, without pss_.",
        ),
        ("spike_updates", "no option spike_updates. Did you mean spike_update?"),
        ("pss_spike_updates", "no option pss_spike_updates. Did you mean spike_update?"),
        *(
            (f"{prefix}{spec.name}", f"RecoveryConfig({spec.name}=...)")
            for spec in dataclasses.fields(RecoveryConfig)
            for prefix in ("", "pss_")
        ),
    ],
)
def test_an_option_that_is_no_option_here_leads_to_the_right_one(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        PSSConfig.preset(**{name: "skip"})


def test_lists_and_single_words_become_tuples() -> None:
    config = PSSConfig(detectors=["grad_norm_ratio"], include="a.b", exclude=None)
    assert (config.detectors, config.include, config.exclude) == (
        ("grad_norm_ratio",),
        ("a.b",),
        (),
    )


def test_a_config_survives_json() -> None:
    config = PSSConfig.preset("anchored", include=("x",), max_interventions=3)
    assert PSSConfig(**json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PSSConfig().max_rank = 3


def test_every_option_explains_itself() -> None:
    helps = {spec.name: spec.metadata["help"] for spec in dataclasses.fields(PSSConfig)}
    assert all(text.endswith(".") for text in helps.values()), helps


def test_the_words_are_those_of_the_registries() -> None:
    for name in DETECTORS:
        assert PSSConfig(detectors=(name,)).detectors == (name,)
    accepted = []
    for name in SMOOTHING_FUNCTIONS:
        try:
            accepted.append(PSSConfig(smoothing=name).smoothing)
        except ConfigurationError:
            continue
    # The floor uses the stable-rank cap by itself.
    assert set(SMOOTHING_FUNCTIONS) - set(accepted) <= {"stable_rank_cap"}


@pytest.mark.parametrize(
    ("preset", "option", "value"),
    [("paper", "floor_ratio", 1.0), ("floor", "smoothing", "log"), ("floor", "scope", "fired")],
)
def test_an_option_without_effect_warns(
    preset: str, option: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    config._warn_once.cache_clear()
    for _ in range(2):
        PSSConfig.preset(preset, **{option: value})
    assert caplog.text.count(f"{option} has no effect") == 1


def test_an_option_with_effect_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    PSSConfig.preset("anchored", floor_ratio=1.0, smoothing="log", threshold_ratio=3.0)
    PSSConfig.preset("paper", max_rank=4, observe_only=True)
    assert caplog.text == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_described_by_its_name(name: str) -> None:
    assert PSSConfig.preset(name).describe() == f"preset {name}"


def test_other_options_are_described_beside_the_nearest_preset() -> None:
    config = PSSConfig.preset("floor", floor_ratio=0.8, roles=["mlp"])
    assert config.describe() == "preset floor with floor_ratio=0.8, roles=['mlp']"
    assert PSSConfig(observe_only=True).describe().endswith(" with observe_only=True")
