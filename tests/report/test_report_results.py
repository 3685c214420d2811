from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hf_pss.evidence.report_records import load_run_directory
from hf_pss.evidence.report_results import compare, headline, mean_result, outcome, result


def sentences(root: Path) -> str:
    return " ".join(headline(load_run_directory(root)))


def test_a_better_run_with_one_seed_is_worded_with_its_caveat(files: Any) -> None:
    files.run("plain", 4.8)
    files.run("floor", 4.3)
    text = sentences(files.info())
    assert (
        "The stable-rank floor ended at a validation loss of 4.300, 0.500 below the plain Trainer "
        "(4.800)." in text
    )
    assert "This is one seed" in text


def test_a_worse_run_is_called_worse(files: Any) -> None:
    files.run("plain", 4.3)
    files.run("paper", 4.4)
    text = sentences(files.info())
    assert (
        "a validation loss of 4.400, 0.100 above the plain Trainer (4.300), which is worse" in text
    )


def test_equal_runs_are_called_equal(files: Any) -> None:
    files.run("plain", 4.3)
    files.run("paper", 4.3002)
    assert "the same as the plain Trainer" in sentences(files.info())


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((4.3, 4.4, 4.5), "on the same side in all 3 seeds (differences from −0.500 to −0.300)"),
        ((4.9, 4.9, 4.9), "which is worse, on the same side in all 3 seeds"),
        ((4.7, 4.9, 4.9), "lower in 1 of 3 seeds"),
    ],
)
def test_several_seeds_are_worded_with_their_spread(
    losses: tuple[float, ...], expected: str, files: Any
) -> None:
    for seed, loss in enumerate(losses):
        files.run("plain", 4.8, seed=seed)
        files.run("floor", loss, seed=seed)
    text = sentences(files.info())
    assert expected in text
    assert "one seed" not in text
    assert ("no consistent difference" in text) == ("lower in" in expected)


def test_a_twin_that_diverged_is_no_number(files: Any) -> None:
    files.run("plain", None, evals=(6.0, None))
    files.run("floor", 4.3)
    files.run("paper", None)
    text = sentences(files.info())
    assert "The stable-rank floor ended finite in one seed where the plain Trainer did not." in text
    assert "PSS as published" not in text


def test_a_guard_that_diverged_is_said(files: Any) -> None:
    files.run("plain", 4.3)
    files.run("floor", None)
    assert "ended non-finite in one seed where the plain Trainer did not" in sentences(files.info())


def test_unfinished_pairs_are_compared_at_their_last_common_evaluation(files: Any) -> None:
    files.run("plain", evals=(6.0, 5.0, 4.5), finished=False)
    files.run("floor", evals=(5.8, 4.9), finished=False)
    text = sentences(files.info(status="interrupted"))
    assert "4.900, 0.100 below the plain Trainer (5.000)" in text
    assert "last common evaluation" in text


def test_finished_pairs_are_not_mixed_with_unfinished_ones(files: Any) -> None:
    files.run("plain", 4.8)
    files.run("floor", 4.3)
    files.run("plain", seed=1, evals=(6.0,), finished=False)
    files.run("floor", seed=1, evals=(6.5,), finished=False)
    comparison = compare(load_run_directory(files.info()), "floor")
    assert comparison.differences == pytest.approx((-0.5,))
    assert comparison.finished


@pytest.mark.parametrize("guards", [["plain"], ["floor"], []])
def test_nothing_to_compare_is_said(guards: list[str], files: Any) -> None:
    files.run("other", evals=(), finished=False)
    for guard in guards:
        files.run(guard, evals=(), finished=False)
    assert "No two runs have come far enough" in sentences(files.info())


def test_seeds_without_a_twin_are_left_out(files: Any) -> None:
    files.run("plain", 4.8)
    files.run("floor", 4.3)
    files.run("floor", 1.0, seed=1)
    assert len(compare(load_run_directory(files.info()), "floor").losses) == 1


def test_a_result_names_its_overhead(twins: Path) -> None:
    line = result(load_run_directory(twins).of("paper")[0])
    assert line.overhead_ratio == pytest.approx(0.002)
    assert line.best_eval_loss == 5.0
    assert line.num_interventions == 1


def test_a_result_without_summary_counts_what_it_sees(files: Any, make_intervention: Any) -> None:
    files.run("paper", losses=[7.0, None], events=[make_intervention(1)], finished=False)
    line = result(load_run_directory(files.info()).runs[0])
    assert (line.num_interventions, line.num_nonfinite_steps) == (1, 1)
    assert line.final_eval_loss == 5.0
    assert math.isnan(line.overhead_ratio)
    assert line.status == "unfinished"


def test_the_mean_takes_finished_seeds_alone(files: Any) -> None:
    files.run("plain", 4.8)
    files.run("plain", seed=1, evals=(9.0,), finished=False)
    mean = mean_result(load_run_directory(files.info()).runs)
    assert mean.final_eval_loss == 4.8
    assert mean.status == "1 of 2 finished"


def test_a_seed_without_a_number_leaves_the_mean_without_it(files: Any) -> None:
    files.run("plain", 4.8)
    files.run("plain", None, seed=1)
    mean = mean_result(load_run_directory(files.info()).runs)
    assert math.isnan(mean.final_eval_loss)
    assert outcome(mean) == "not finite"
    assert mean.train_seconds == 50.0
