"""The results of a demo run as numbers, as sentences and as a table for the terminal.

The sentences claim no more than was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from rich.table import Table

from hf_pss.evidence.report_records import Curve, RunDirectory, TrainingRun, load_run_directory
from hf_pss.view.numbers import count, duration, fixed, percent
from hf_pss.view.tables import lean_table

__all__ = [
    "Result",
    "TwinComparison",
    "compare",
    "headline",
    "label",
    "mean_result",
    "outcome",
    "render_table",
    "result",
]

# The report shows losses with three decimals. It calls two losses equal if they look equal there.
_SAME_LOSS = 0.0005

_LABELS = {
    "plain": "plain Trainer",
    "paper": "PSS as published",
    "floor": "stable-rank floor",
    "anchored": "PSS, anchored",
}


def label(guard: str) -> str:
    """Return a guard's name for people. A guard that the package does not know keeps its name."""
    return _LABELS.get(guard, guard)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the summary table. A number that the run has not recorded is NaN."""

    final_eval_loss: float
    best_eval_loss: float
    final_train_loss: float
    num_interventions: float
    num_nonfinite_steps: float
    overhead_ratio: float
    """Seconds in PSS divided by seconds of training."""
    train_seconds: float
    status: str


@dataclass(frozen=True, slots=True)
class TwinComparison:
    """The validation losses of a guard and of its twin, seed by seed."""

    guard: str
    losses: tuple[float, ...]
    """The guard's loss, for each seed in which both losses are finite."""
    twin_losses: tuple[float, ...]
    """The reference guard's losses for the same seeds."""
    num_rescued: int
    """Number of seeds in which only the guard ended with a finite loss."""
    num_lost: int
    """Number of seeds in which only the twin ended with a finite loss."""
    finished: bool
    """False if no pair has finished. Then each pair is compared at its last common evaluation."""

    @property
    def differences(self) -> tuple[float, ...]:
        """Loss of the guard minus that of its twin. A positive number is worse."""
        return tuple(
            ours - theirs for ours, theirs in zip(self.losses, self.twin_losses, strict=True)
        )

    @property
    def num_pairs(self) -> int:
        """Number of seeds that can be compared."""
        return len(self.losses) + self.num_rescued + self.num_lost


def result(run: TrainingRun) -> Result:
    """Return the line of a run, from its summary or, if it has none yet, from its curves."""
    summary = run.summary
    num_interventions = len(run.interventions)
    evals = run.eval_loss.finite
    best = float(evals.min()) if len(evals) else math.nan
    if summary is None:
        return Result(
            final_eval_loss=_last(run.eval_loss),
            best_eval_loss=best,
            final_train_loss=_last(run.loss),
            num_interventions=num_interventions,
            num_nonfinite_steps=float(np.isnan(run.loss.values).sum()),
            overhead_ratio=math.nan,
            train_seconds=math.nan,
            status="unfinished",
        )
    eval_loss, train_loss = summary.final_eval_loss, summary.final_train_loss
    if not summary.finished and math.isnan(eval_loss):
        eval_loss = _last(run.eval_loss)
    if summary.num_interventions is not None:
        num_interventions = summary.num_interventions
    num_nonfinite, seconds = summary.num_nonfinite_steps, summary.train_seconds
    return Result(
        final_eval_loss=eval_loss,
        best_eval_loss=best,
        final_train_loss=_last(run.loss) if math.isnan(train_loss) else train_loss,
        num_interventions=num_interventions,
        num_nonfinite_steps=math.nan if num_nonfinite is None else num_nonfinite,
        overhead_ratio=summary.pss_seconds / seconds if seconds > 0 else math.nan,
        train_seconds=seconds,
        status=summary.status,
    )


def outcome(line: Result) -> str:
    """Write the final validation loss; a run that finished without a finite one has diverged."""
    if math.isnan(line.final_eval_loss) and line.status == "finished":
        return "not finite"
    return fixed(line.final_eval_loss)


def mean_result(results: Sequence[Result]) -> Result:
    """Return the mean over the seeds that have finished, or over all seeds if none has.

    It is NaN if one seed has no number, because a mean without the diverged seeds would
    flatter the guard.
    """
    finished = [one for one in results if one.status == "finished"]
    taken = finished or results
    status = taken[0].status
    if 0 < len(finished) < len(results):
        status = f"{len(finished)} of {len(results)} finished"
    names = [field.name for field in fields(Result) if field.name != "status"]
    means = {name: float(np.mean([getattr(one, name) for one in taken])) for name in names}
    return Result(**means, status=status)


def compare(directory: RunDirectory, guard: str) -> TwinComparison:
    """Compare every run of a guard with its twin: the reference guard's run of the same seed.

    If some pairs have finished, they are compared at their end, and the unfinished pairs are left
    out. If no pair has finished, each is compared at its last common evaluation.
    """
    twins = {run.seed: run for run in directory.of(directory.reference)}
    pairs = [(run, twins[run.seed]) for run in directory.of(guard) if run.seed in twins]
    finished = [pair for pair in pairs if _finished(*pair)]
    losses = [_paired_losses(*pair) for pair in finished or pairs]
    both = [pair for pair in losses if math.isfinite(pair[0]) and math.isfinite(pair[1])]
    return TwinComparison(
        guard=guard,
        losses=tuple(ours for ours, _ in both),
        twin_losses=tuple(theirs for _, theirs in both),
        num_rescued=sum(math.isfinite(ours) > math.isfinite(theirs) for ours, theirs in losses),
        num_lost=sum(math.isfinite(ours) < math.isfinite(theirs) for ours, theirs in losses),
        finished=bool(finished),
    )


def headline(directory: RunDirectory) -> list[str]:
    """Return the measured result in a few sentences, each of which is true by itself."""
    others = [guard for guard in directory.guards if guard != directory.reference]
    comparisons = [compare(directory, guard) for guard in others]
    sentences = [_sentence(directory, one) for one in comparisons if one.num_pairs]
    if not sentences:
        sentences = ["No two runs have come far enough to be compared."]
    if not all(one.finished for one in comparisons if one.num_pairs):
        sentences.append(
            "Not every pair has finished: such a pair is compared at its last common evaluation."
        )
    num_pairs = max((one.num_pairs for one in comparisons), default=0)
    if num_pairs == 1:
        sentences.append(
            "This is one seed: others may change these numbers or reverse a small difference."
        )
    return sentences


def _sentence(directory: RunDirectory, comparison: TwinComparison) -> str:
    name, twin = label(comparison.guard), label(directory.reference)

    def seeds(number: int) -> str:
        return "one seed" if number == 1 else f"{number} seeds"

    parts = []
    if comparison.losses:
        parts.append(_difference(comparison, twin))
    if comparison.num_rescued:
        parts.append(f"ended finite in {seeds(comparison.num_rescued)} where the {twin} did not")
    if comparison.num_lost:
        parts.append(f"ended non-finite in {seeds(comparison.num_lost)} where the {twin} did not")
    subject = name if name.startswith("PSS") else f"The {name}"
    return f"{subject} {', and '.join(parts)}."


def _difference(comparison: TwinComparison, twin: str) -> str:
    differences = comparison.differences
    ours, theirs, mean = (
        float(np.mean(values))
        for values in (comparison.losses, comparison.twin_losses, differences)
    )
    worse = "" if mean < 0 else ", which is worse"
    side = f"{abs(mean):.3f} {'below' if mean < 0 else 'above'} the {twin} ({theirs:.3f}){worse}"
    if all(abs(difference) < _SAME_LOSS for difference in differences):
        return f"ended at a validation loss of {ours:.3f}, the same as the {twin} ({theirs:.3f})"
    if len(differences) == 1:
        return f"ended at a validation loss of {ours:.3f}, {side}"
    num_lower = sum(difference < 0 for difference in differences)
    spread = f"differences from {_signed(min(differences))} to {_signed(max(differences))}"
    if num_lower in (0, len(differences)):
        return (
            f"ended at a mean validation loss of {ours:.3f}, {side}, "
            f"on the same side in all {len(differences)} seeds ({spread})"
        )
    return (
        f"ended at a mean validation loss of {ours:.3f} against {theirs:.3f} of the {twin}, "
        f"lower in {num_lower} of {len(differences)} seeds ({spread}): no consistent difference"
    )


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−")  # a minus sign, for people


def _finished(run: TrainingRun, twin: TrainingRun) -> bool:
    return all(one.summary is not None and one.summary.finished for one in (run, twin))


def _paired_losses(run: TrainingRun, twin: TrainingRun) -> tuple[float, float]:
    if _finished(run, twin):
        return result(run).final_eval_loss, result(twin).final_eval_loss
    common = np.intersect1d(run.eval_loss.steps, twin.eval_loss.steps)
    if len(common) == 0:
        return math.nan, math.nan
    ours, theirs = (one.eval_loss.values[one.eval_loss.steps == common[-1]] for one in (run, twin))
    return float(ours[0]), float(theirs[0])


def _last(curve: Curve) -> float:
    return float(curve.values[-1]) if len(curve) else math.nan


def render_table(run_dir: Path) -> Table:
    """Return a table with the mean losses, events and overhead of every guard over its seeds.

    Args:
        run_dir: A run directory. The run may be interrupted.

    Raises:
        ConfigurationError: `run_dir` holds no run.
    """
    directory = load_run_directory(run_dir)
    rows = []
    for guard in directory.guards:
        line = mean_result([result(run) for run in directory.of(guard)])
        numbers = (count(line.num_interventions), count(line.num_nonfinite_steps))
        times = (percent(line.overhead_ratio), duration(line.train_seconds))
        rows.append((guard, outcome(line), fixed(line.final_train_loss), *numbers, *times))
    seeds = len(directory.seeds)
    mean = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
    state = "" if directory.status == "finished" else ", not finished"
    return lean_table(
        ["guard"],
        [
            "validation\nloss",
            "training\nloss",
            "inter-\nventions",
            "NaN\nor inf",
            "overhead",
            "time",
        ],
        rows=rows,
        title=f"Twin runs, {mean}{state}",
    )
