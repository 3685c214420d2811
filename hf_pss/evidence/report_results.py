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

from hf_pss.evidence.report_records import (
    Curve,
    RunDirectory,
    TrainingRun,
    label,
    load_run_directory,
    number,
)
from hf_pss.view.numbers import count, duration, fixed, percent
from hf_pss.view.tables import lean_table

# The report shows losses with three decimals. It calls two losses equal if they look equal there.
_SAME_LOSS = 0.0005


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
    losses: tuple[tuple[float, float], ...]
    """The losses of the guard and of its twin, for each seed in which both are finite."""
    num_rescued: int
    """Number of seeds in which only the guard ended with a finite loss."""
    num_lost: int
    """Number of seeds in which only the twin ended with a finite loss."""
    finished: bool
    """False if no pair has finished. Then each pair is compared at its last common evaluation."""

    @property
    def differences(self) -> tuple[float, ...]:
        """Loss of the guard minus that of its twin. A positive number is worse."""
        return tuple(ours - theirs for ours, theirs in self.losses)

    @property
    def num_pairs(self) -> int:
        """Number of seeds that can be compared."""
        return len(self.losses) + self.num_rescued + self.num_lost


def result(run: TrainingRun) -> Result:
    """Return the line of a run, from its summary or, if it has none yet, from its curves."""
    summary = run.summary
    evals = run.eval_loss.finite
    seconds = number(summary.get("train_seconds"))

    def recorded(name: str, otherwise: float) -> float:
        value = number(summary.get(name))
        return otherwise if math.isnan(value) else value

    # A run that has finished without a finite loss has diverged; others may have come less far.
    reached = math.nan if run.status == "finished" else _last(run.eval_loss)
    return Result(
        final_eval_loss=recorded("final_eval_loss", reached),
        best_eval_loss=float(evals.min()) if len(evals) else math.nan,
        final_train_loss=recorded("final_train_loss", _last(run.loss)),
        num_interventions=recorded("num_interventions", len(run.interventions)),
        num_nonfinite_steps=recorded("num_nonfinite_steps", int(np.isnan(run.loss.values).sum())),
        overhead_ratio=number(summary.get("pss_seconds")) / seconds if seconds > 0 else math.nan,
        train_seconds=seconds,
        status=run.status,
    )


def outcome(line: Result) -> str:
    """Write the final validation loss; a run that finished without a finite one has diverged."""
    if math.isnan(line.final_eval_loss) and line.status == "finished":
        return "not finite"
    return fixed(line.final_eval_loss)


def mean_result(runs: Sequence[TrainingRun]) -> Result:
    """Return the mean over the seeds that have finished, or over all seeds if none has.

    It is NaN if one seed has no number, because a mean without the diverged seeds would
    flatter the guard.
    """
    results = [result(run) for run in runs]
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
    finished = [pair for pair in pairs if all(run.status == "finished" for run in pair)]
    losses = [_paired_losses(*pair) for pair in finished or pairs]
    return TwinComparison(
        guard=guard,
        losses=tuple(pair for pair in losses if all(map(math.isfinite, pair))),
        num_rescued=sum(math.isfinite(ours) > math.isfinite(theirs) for ours, theirs in losses),
        num_lost=sum(math.isfinite(ours) < math.isfinite(theirs) for ours, theirs in losses),
        finished=bool(finished),
    )


def headline(directory: RunDirectory) -> list[str]:
    """Return the measured result in a few sentences, each of which is true by itself."""
    others = [guard for guard in directory.guards if guard != directory.reference]
    comparisons = [one for guard in others if (one := compare(directory, guard)).num_pairs]
    sentences = [_sentence(directory, one) for one in comparisons]
    if not sentences:
        sentences = ["No two runs have come far enough to be compared."]
    if not all(one.finished for one in comparisons):
        sentences.append(
            "Not every pair has finished. An unfinished pair is compared at its last common "
            "evaluation."
        )
    if max((one.num_pairs for one in comparisons), default=0) == 1:
        sentences.append(
            "This is one seed: others may change these numbers or reverse a small difference."
        )
    return sentences


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _sentence(directory: RunDirectory, comparison: TwinComparison) -> str:
    name, twin = label(comparison.guard), label(directory.reference)
    parts = [_difference(comparison, twin)] if comparison.losses else []
    for ended, num_seeds in (
        ("ended finite", comparison.num_rescued),
        ("ended non-finite", comparison.num_lost),
    ):
        parts += [f"{ended} in {_seeds(num_seeds)} where the {twin} did not"] if num_seeds else []
    subject = name if name.startswith("PSS") else f"The {name}"
    return f"{subject} {', and '.join(parts)}."


def _difference(comparison: TwinComparison, twin: str) -> str:
    differences = comparison.differences
    ours, theirs = np.mean(comparison.losses, axis=0)
    mean = np.mean(differences)
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


def _paired_losses(run: TrainingRun, twin: TrainingRun) -> tuple[float, float]:
    if run.status == twin.status == "finished":
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
        line = mean_result(directory.of(guard))
        numbers = (count(line.num_interventions), count(line.num_nonfinite_steps))
        times = (percent(line.overhead_ratio), duration(line.train_seconds))
        rows.append((guard, outcome(line), fixed(line.final_train_loss), *numbers, *times))
    num_seeds = len(directory.seeds)
    mean = "one seed" if num_seeds == 1 else f"mean of {num_seeds} seeds"
    state = "" if directory.status == "finished" else ", not finished"
    columns = ["validation\nloss", "training\nloss", "inter-\nventions", "NaN\nor inf"]
    columns += ["overhead", "time"]
    return lean_table(["guard"], columns, rows=rows, title=f"Twin runs, {mean}{state}")
