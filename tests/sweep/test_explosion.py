"""The written definition of an explosion, on curves drawn by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_pss.detection.explosion import Explosion, ExplosionRule, find_explosion

RULE = ExplosionRule()
ENTROPY = 6.4
DESCENT = [6.5 - 0.03 * step for step in range(100)]  # 6.5 to 3.53


def found(losses: list[float | None]) -> Explosion | None:
    return find_explosion(losses, RULE, unigram_entropy=ENTROPY)


def test_descent_then_rise() -> None:
    explosion = found(DESCENT + [6.0] * 60)
    assert explosion is not None
    assert explosion.kind == "rise"
    # The median of 25 passes half a nat when 13 of the steps lie after the jump.
    assert 100 < explosion.step <= 100 + RULE.smoothing_steps


def test_a_rise_has_to_reach_the_height_and_to_last() -> None:
    bottom = DESCENT[-1]
    assert found(DESCENT + [bottom + 0.4] * 100 + [bottom] * 60) is None
    short = RULE.smoothing_steps // 2  # such a spike never reaches the median
    assert found(DESCENT + [bottom + 3.0] * short + [bottom] * 60) is None
    assert found(DESCENT + [bottom + 3.0] * 60 + [bottom] * 60) is not None


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_explosion(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wobble = (0.3 * torch.randn(400, generator=generator)).tolist()
    curve = DESCENT + [DESCENT[-1]] * 300
    assert found([loss + w for loss, w in zip(curve, wobble, strict=True)]) is None


def test_a_rise_before_any_descent_is_none() -> None:
    losses: list[float | None] = [7.0] * 30 + [9.0] * 100 + [3.0] * 60
    assert found(losses) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_one_loss_that_is_not_finite_is_none_and_twenty_are(bad: float | None) -> None:
    flat = [DESCENT[-1]] * 60
    assert found([*DESCENT, bad, *flat]) is None
    assert found([*DESCENT, *[bad] * 19, *flat]) is None
    assert found([*DESCENT, *[bad] * 20, *flat]) == Explosion("non_finite", 101)


def test_a_run_that_ends_without_a_finite_loss_has_exploded() -> None:
    assert found([*DESCENT, math.nan]) == Explosion("non_finite", 101)
    assert found([math.nan]) == Explosion("non_finite", 1)


def test_steps_skipped_in_a_rise_do_not_end_it() -> None:
    rising: list[float | None] = [6.0] * 60
    rising[30] = None
    explosion = found(DESCENT + rising)
    assert explosion is not None
    assert explosion.kind == "rise"


def test_a_model_that_never_learned_is_at_a_plateau_from_its_first_step() -> None:
    assert found([6.45] * 200) == Explosion("plateau", 1)
    assert found([6.45] * 49) is None  # too short to say


def test_a_plateau_begins_where_the_loss_came_to_stay() -> None:
    """A slow return to unigram entropy that no rise of half a nat marks."""
    dipped = [6.45] * 50 + [6.2] * 100 + [6.4] * 100
    explosion = found(dipped)
    assert explosion is not None
    assert explosion.kind == "plateau"
    # The window's median crosses with the window half full.
    assert abs(explosion.step - 151) <= RULE.plateau_steps // 2


def test_a_run_that_left_unigram_entropy_is_at_no_plateau() -> None:
    assert found([6.45] * 100 + [5.0] * 51) is None


def test_the_first_explosion_counts() -> None:
    broken: list[float | None] = [math.nan] * 30
    assert found([*DESCENT, *broken, *[6.0] * 60]) == Explosion("non_finite", 101)
    late = found([*DESCENT, *[6.0] * 60, *broken])
    assert late is not None
    assert late.kind == "rise"


def test_an_empty_curve_has_none() -> None:
    assert found([]) is None
