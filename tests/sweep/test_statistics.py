"""Statistics of paired runs: known answers, and how far a bootstrap interval is to be trusted."""

from __future__ import annotations

import pytest
import torch
from sweep_rows import ENTROPY, grid_of_rows, row

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.rows import (
    best_learning_rate,
    bootstrap_interval,
    by_setting,
    comparable,
    compare_at,
    compare_at_best,
    final_loss,
    losses_by_rate,
    steps_to_loss,
    usable_range,
)

EXACT = 1e-12
# Share of 95 % intervals that hold the true mean, normal differences, 300 simulated comparisons;
# three standard deviations of such a share are 0.064 at 5 seeds.
NUM_SIMULATED = 300
COVERAGE_BAND = 0.064
COVERAGE = {5: 0.837, 20: 0.920}  # measured; nominal 0.95


def test_a_run_without_a_finite_loss_or_a_high_one_counts_as_unigram_entropy() -> None:
    assert final_loss(row(loss=4.0)) == 4.0
    assert final_loss(row(loss=None)) == ENTROPY
    assert final_loss(row(loss=9.0)) == ENTROPY


def test_losses_are_by_ascending_rate_and_seed() -> None:
    rows = [row(rate=1e-2, seed=1), row(rate=1e-3, seed=0), row("floor", rate=1.0)]
    assert losses_by_rate(rows, "clip") == {1e-3: {0: 4.0}, 1e-2: {1: 4.0}}
    assert list(losses_by_rate(rows, "clip")) == [1e-3, 1e-2]


def test_settings_are_what_was_compared() -> None:
    rows = [row(), row(optimizer="muon"), row(recipe="a")]
    assert [str(s) for s in by_setting(rows)] == ["a · adamw", "tiny · adamw", "tiny · muon"]


def test_the_best_rate_is_that_of_the_lowest_median() -> None:
    # The mean of the second is lower.
    rows = [row(rate=1e-3, seed=s, loss=v) for s, v in enumerate([4.0, 4.0, 4.0])]
    rows += [row(rate=1e-2, seed=s, loss=v) for s, v in enumerate([1.0, 4.1, 4.1])]
    assert best_learning_rate(rows, "clip") == 1e-3


def test_usable_range() -> None:
    rows = grid_of_rows()
    assert usable_range(rows, "clip") == (1e-3, 1e-3)
    assert usable_range(rows, "floor") == (1e-3, 1e-2)
    assert usable_range(rows, "floor", within_nats=0.6) == (1e-3, 1e-1)


def test_a_bad_rate_between_ends_the_usable_range() -> None:
    losses = {1e-4: 4.0, 1e-3: 5.0, 1e-2: 3.99, 3e-2: 4.02}
    rows = [row(rate=rate, loss=loss) for rate, loss in losses.items()]
    assert usable_range(rows, "clip") == (1e-2, 3e-2)


def test_differences_are_paired_by_seed_and_lone_seeds_left_out() -> None:
    ours = {0: 3.0, 1: 3.5, 2: 9.0, 7: 1.0}
    theirs = {2: 4.0, 1: 4.0, 0: 4.0, 5: 0.0}
    rows = [row("floor", seed=s, loss=v) for s, v in ours.items()]
    rows += [row("clip", seed=s, loss=v) for s, v in theirs.items()]
    found = compare_at(rows, "floor", "clip", (1e-3, 1e-3))
    assert found is not None
    assert found.differences == (-1.0, -0.5, ENTROPY - 4.0)
    assert found.mean == pytest.approx(0.5 / 3, abs=EXACT)
    assert found.num_wins == 2
    assert found.interval is not None


def test_nothing_is_compared_without_a_common_seed() -> None:
    rows = [row("floor", seed=1), row("clip", seed=0)]
    assert compare_at(rows, "floor", "clip", (1e-3, 1e-3)) is None


def test_each_guard_is_compared_at_its_own_best_rate() -> None:
    found = compare_at_best(grid_of_rows(), "floor", "clip")
    assert found is not None
    assert found.learning_rates == (1e-2, 1e-3)
    assert found.differences == pytest.approx((-0.1,) * 3, abs=EXACT)


def test_below_three_seeds_there_is_no_interval() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([1.0, 2.0, 3.0]) is not None


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval([-0.25] * 4) == (-0.25, -0.25)


def test_an_interval_is_repeatable_moves_with_its_data_and_holds_the_mean() -> None:
    # Eighths, eight of them: no sum or mean is rounded, here or two higher.
    data = [0.125, 0.375, -0.25, 0.25, 0.0, 0.5, 0.125, -0.125]
    interval = bootstrap_interval(data)
    assert interval is not None
    assert interval == bootstrap_interval(data)
    assert interval[0] < sum(data) / len(data) < interval[1]
    moved = bootstrap_interval([value + 2 for value in data])
    assert moved == pytest.approx([bound + 2 for bound in interval], abs=EXACT)


@pytest.mark.parametrize("num_seeds", list(COVERAGE))
def test_coverage_of_the_interval_is_what_its_docstring_warns_of(num_seeds: int) -> None:
    """Below 95 % with five seeds: such an interval is read beside the number of wins."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(NUM_SIMULATED, num_seeds, generator=generator, dtype=torch.float64)
    intervals = [bootstrap_interval(sample) for sample in samples.tolist()]
    covered = [i is not None and i[0] <= 0.0 <= i[1] for i in intervals]
    assert abs(sum(covered) / NUM_SIMULATED - COVERAGE[num_seeds]) <= COVERAGE_BAND


def test_steps_to_a_loss_count_evaluated_finite_steps_only() -> None:
    found = row(eval_steps=(10, 20, 30, 40), eval_losses=(5.0, None, 4.2, 4.6))
    assert steps_to_loss(found, 4.5) == 30
    assert steps_to_loss(found, 4.2) == 30
    assert steps_to_loss(found, 5.0) == 10
    assert steps_to_loss(found, 1.0) is None


def test_what_is_comparable_and_what_is_not() -> None:
    kept = comparable([row(status="failed"), row(seed=1), row(seed=1)])
    assert [r.seed for r in kept] == [1]
    other = row(seed=2, guard_id="other")
    with pytest.raises(ConfigurationError, match="two sets of options"):
        comparable([row(seed=1), other])
    changed = row(seed=2, guard_id="other", changes={"num_steps": 9})
    assert len(by_setting(comparable([row(seed=1), changed]))) == 2
    assert "num_steps 9" in str(*by_setting([changed]))
