"""``pss_lr_scale``: a schedule that is scaled, and that a resume does not scale twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    arguments,
    checkpoint_differences,
    events_of,
    make_trainer,
    token_rows,
    train,
    weights_of,
)
from torch import nn

from hf_pss import PSSConfig, PSSTrainingArguments, RecoveryConfig
from hf_pss.errors import ConfigurationError
from hf_pss.trainer.optimizers import set_base_rates_

RATE = 2.0**-9
STEPS = {"max_steps": 8, "save_steps": 2, "learning_rate": RATE, "warmup_steps": 2}
MUON = {"pss_optim": "muon", "pss_optim_args": {"others_lr": RATE / 2}}
SPLIT = {"pss_optim": "adamw", "pss_optim_args": {"matrix_lr_ratio": 0.5}}


def scaled(folder: Path, scale: float | None, *, resume: Any = None, **options: Any) -> Any:
    options = {**STEPS, "pss_lr_scale": scale, **options}
    return train(folder, PSSConfig.preset("paper", detectors=()), resume=resume, **options)


def rates_of(trainer: Any) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_a_scaled_run_is_the_run_with_that_rate(tmp_path: Path) -> None:
    one = scaled(tmp_path / "scaled", 0.25)
    other = scaled(tmp_path / "given", None, learning_rate=RATE / 4)
    assert rates_of(one) == rates_of(other)
    weights = weights_of(other.model)
    assert all(torch.equal(weights[name], w) for name, w in weights_of(one.model).items())


def test_a_resumed_run_goes_on_scaled_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = rates_of(scaled(tmp_path / "run", None))
    resumed = scaled(tmp_path / "on", 0.25, resume=tmp_path / "run" / "checkpoint-4")
    assert rates_of(resumed) == [*before[:4], *(rate / 4 for rate in before[4:])]
    assert "base rate of 0.000488. The checkpoint" in caplog.text


def test_the_first_update_after_a_resume_is_scaled(tmp_path: Path) -> None:
    """At a rate of nearly nothing no weight moves."""
    scaled(tmp_path / "run", None)
    source = tmp_path / "run" / "checkpoint-4"
    resumed = scaled(tmp_path / "on", 2.0**-60, resume=source, weight_decay=0.0)
    before = scaled(tmp_path / "none", None, resume=source, max_steps=4)
    there, here = weights_of(before.model), weights_of(resumed.model)
    assert all(torch.equal(there[name], weight) for name, weight in here.items())


def test_one_that_is_resumed_again_is_not_scaled_twice(tmp_path: Path) -> None:
    scaled(tmp_path / "run", None)
    source = tmp_path / "run" / "checkpoint-4"
    scaled(tmp_path / "straight", 0.3, resume=source)
    scaled(tmp_path / "halves", 0.3, resume=tmp_path / "straight" / "checkpoint-6")
    ends = [tmp_path / name / "checkpoint-8" for name in ("straight", "halves")]
    assert not checkpoint_differences(*ends)
    # Without it the checkpoint's rates go on, as always; with 1 those that are given.
    plain = scaled(tmp_path / "plain", None, resume=tmp_path / "straight" / "checkpoint-6")
    assert not checkpoint_differences(ends[0], tmp_path / "plain" / "checkpoint-8")
    back = scaled(tmp_path / "back", 1.0, resume=tmp_path / "straight" / "checkpoint-6")
    rates = rates_of(plain)
    assert rates_of(back) == [*rates[:6], *(pytest.approx(rate / 0.3) for rate in rates[6:])]


@pytest.mark.parametrize("own", [MUON, SPLIT], ids=["muon", "adamw"])
def test_groups_with_rates_of_their_own_keep_their_ratio(
    own: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaled(tmp_path / "run", None, **own)
    resumed = scaled(tmp_path / "on", 0.25, resume=tmp_path / "run" / "checkpoint-4", **own)
    groups, bases = resumed.optimizer.param_groups, resumed.lr_scheduler.base_lrs
    found = {(group["algo"], base) for group, base in zip(groups, bases, strict=True)}
    if own is MUON:
        assert found == {("muon", RATE / 4), ("adamw", RATE / 8)}
    else:
        assert found == {("adamw", RATE / 8), ("adamw", RATE / 4)}
    # Resumed once more, others_lr is not said to be without effect: it has one.
    scaled(tmp_path / "again", 0.25, resume=tmp_path / "on" / "checkpoint-8", max_steps=9, **own)
    assert "has no effect" not in caplog.text


def test_another_ratio_after_a_resume_is_warned_of_and_has_effect_with_a_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaled(tmp_path / "run", None, **SPLIT)
    source = tmp_path / "run" / "checkpoint-4"
    other = {"pss_optim": "adamw", "pss_optim_args": "matrix_lr_ratio=0.25"}
    kept = scaled(tmp_path / "kept", None, resume=source, **other)
    assert kept.lr_scheduler.base_lrs == [RATE / 2, RATE, RATE]
    assert "has no effect. To use it, set pss_lr_scale=1" in caplog.text
    taken = scaled(tmp_path / "taken", 1.0, resume=source, **other)
    assert taken.lr_scheduler.base_lrs == [RATE / 4, RATE, RATE]


def test_a_rollback_goes_on_at_the_scaled_rate(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", on_nonfinite="stop")
    options = {**STEPS, "pss_lr_scale": 0.25}
    plain = make_trainer(tmp_path / "plain", PSSConfig.preset("paper"), **options)
    plain.train()
    trainer = make_trainer(
        tmp_path / "run", config, recovery=RecoveryConfig(on_failure="rollback"), **options
    )
    broken = {5}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        step = trainer.state.global_step + 1
        return gradient * float("nan") if step in broken else gradient

    next(trainer.model.parameters()).register_hook(spoil)
    trainer.train()
    assert "back to checkpoint-4" in events_of(tmp_path / "run")[-1]["reason"]
    assert rates_of(trainer)[-3:] == rates_of(plain)[-3:]


def test_another_train_is_scaled_by_what_is_given_then(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PSSConfig.preset("paper"), **STEPS, pss_lr_scale=0.25)
    for scale in (0.25, 0.25, 0.5):
        trainer.args.pss_lr_scale = scale
        trainer.train()
        assert set(trainer.lr_scheduler.base_lrs) == {RATE * scale}
    # An optimizer of its own, as each trial of a search has one.
    trainer.args.learning_rate, trainer.optimizer = RATE / 8, None
    trainer.train()
    assert set(trainer.lr_scheduler.base_lrs) == {RATE / 16}


def test_a_schedule_that_is_no_multiple_of_its_base_is_refused(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    options |= {"eval_steps": 4, "eval_rows": token_rows(4)}
    with pytest.raises(ConfigurationError, match="cannot scale ReduceLROnPlateau"):
        scaled(tmp_path, 0.5, **options)
    assert scaled(tmp_path, None, **options).state.global_step == 8


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "0.5", True])
def test_a_factor_that_is_none_is_refused(tmp_path: Path, scale: Any) -> None:
    with pytest.raises(ConfigurationError, match="pss_lr_scale is a number above 0"):
        arguments(tmp_path, PSSTrainingArguments, pss_lr_scale=scale)


def test_rates_that_are_tensors_stay_tensors() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": rate}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert set_base_rates_(schedule, [0.25]) == [0.5]
    assert optimizer.param_groups[0]["lr"].item() == 0.125
    assert optimizer.param_groups[0]["lr"] is rate
    with pytest.raises(
        ConfigurationError, match="1 base rates, and the optimizer was built with 2"
    ):
        set_base_rates_(schedule, [0.25, 0.25])
