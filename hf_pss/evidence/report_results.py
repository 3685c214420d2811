"""What the runs show, in numbers and in sentences that claim no more than was measured.

The result of a demo run as a table for the terminal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from hf_pss.evidence.report_records import Curve, RunDirectory, TrainingRun, load_run_directory
from hf_pss.view import text_table as text

__all__ = [
    "Comparison",
    "Result",
    "compare",
    "headline",
    "label",
    "mean_result",
    "outcome",
    "render_table",
    "result",
]

# Losses are shown with three decimals; what rounds to nothing is no difference.
_SAME_LOSS = 0.0005

_LABELS = {
    "plain": "plain Trainer",
    "paper": "PSS as published",
    "floor": "stable-rank floor",
    "anchored": "PSS, anchored",
}


def label(guard: str) -> str:
    """What people call a guard; one the package does not know keeps its own name."""
    return _LABELS.get(guard, guard)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the summary table; NaN where the run does not say."""

    final_eval_loss: float
    best_eval_loss: float
    final_train_loss: float
    num_interventions: float
    num_nonfinite_steps: float
    overhead_ratio: float
    """Seconds of PSS over seconds of training."""
    train_seconds: float
    status: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A guard's validation loss beside its twin's, seed by seed."""

    guard: str
    losses: tuple[float, ...]
    """One for each seed where both are finite."""
    twin_losses: tuple[float, ...]
    """The reference guard's, same seeds."""
    num_rescued: int
    """Seeds in which only the guard ended finite."""
    num_lost: int
    """Seeds in which only the twin ended finite."""
    finished: bool
    """False where the pairs had to be compared at their last common evaluation."""

    @property
    def differences(self) -> tuple[float, ...]:
        """Loss minus the twin's loss; positive is worse."""
        return tuple(
            ours - theirs for ours, theirs in zip(self.losses, self.twin_losses, strict=True)
        )

    @property
    def num_pairs(self) -> int:
        """Seeds for which there is something to say."""
        return len(self.losses) + self.num_rescued + self.num_lost


def result(run: TrainingRun) -> Result:
    """Sum one run up, from its summary or, where it has none yet, from its curves."""
    summary = run.summary
    num_seen = float(len(run.interventions))
    if summary is None:
        return Result(
            final_eval_loss=_last(run.eval_loss),
            best_eval_loss=_best(run),
            final_train_loss=_last(run.loss),
            num_interventions=num_seen,
            num_nonfinite_steps=float(np.isnan(run.loss.values).sum()),
            overhead_ratio=math.nan,
            train_seconds=math.nan,
            status="unfinished",
        )
    finished_loss = summary.final_eval_loss
    if not summary.finished and math.isnan(finished_loss):
        finished_loss = _last(run.eval_loss)
    num_interventions, num_nonfinite = summary.num_interventions, summary.num_nonfinite_steps
    return Result(
        final_eval_loss=finished_loss,
        best_eval_loss=_best(run),
        final_train_loss=_or(summary.final_train_loss, _last(run.loss)),
        num_interventions=num_seen if num_interventions is None else num_interventions,
        num_nonfinite_steps=math.nan if num_nonfinite is None else num_nonfinite,
        overhead_ratio=_ratio(summary.pss_seconds, summary.train_seconds),
        train_seconds=summary.train_seconds,
        status=summary.status,
    )


def outcome(line: Result) -> str:
    """Write the final validation loss; a run that came to its end without one has diverged."""
    if math.isnan(line.final_eval_loss) and line.status == "finished":
        return "not finite"
    return text.fixed(line.final_eval_loss)


def mean_result(results: list[Result]) -> Result:
    """Average over the seeds that have finished, or over all where none has.

    One seed without a number leaves the mean without it: a mean without the diverged is none.
    """
    finished = [one for one in results if one.status == "finished"]
    status = (
        f"{len(finished)} of {len(results)} finished" if 0 < len(finished) < len(results) else ""
    )
    results = finished or results

    def mean(name: str) -> float:
        return float(np.mean([getattr(one, name) for one in results]))

    return Result(
        final_eval_loss=mean("final_eval_loss"),
        best_eval_loss=mean("best_eval_loss"),
        final_train_loss=mean("final_train_loss"),
        num_interventions=mean("num_interventions"),
        num_nonfinite_steps=mean("num_nonfinite_steps"),
        overhead_ratio=mean("overhead_ratio"),
        train_seconds=mean("train_seconds"),
        status=status or results[0].status,
    )


def compare(directory: RunDirectory, guard: str) -> Comparison:
    """Pair every run of a guard with its twin: the run of the reference guard with the same seed.

    Pairs that have finished are compared at their end, and then the others are left out. Where
    none has, each is compared at its last common evaluation.
    """
    twins = {run.seed: run for run in directory.of(directory.reference)}
    pairs = [(run, twins[run.seed]) for run in directory.of(guard) if run.seed in twins]
    finished = [pair for pair in pairs if _finished(*pair)]
    losses = [_paired_losses(*pair) for pair in finished or pairs]
    both = [pair for pair in losses if math.isfinite(pair[0]) and math.isfinite(pair[1])]
    return Comparison(
        guard=guard,
        losses=tuple(ours for ours, _ in both),
        twin_losses=tuple(theirs for _, theirs in both),
        num_rescued=sum(math.isfinite(ours) > math.isfinite(theirs) for ours, theirs in losses),
        num_lost=sum(math.isfinite(ours) < math.isfinite(theirs) for ours, theirs in losses),
        finished=bool(finished),
    )


def headline(directory: RunDirectory) -> list[str]:
    """The measured result in a few sentences, worded so that they hold as they stand."""
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
            "This is one seed: another may move these numbers, and could turn a small difference."
        )
    return sentences


def _sentence(directory: RunDirectory, comparison: Comparison) -> str:
    name, twin = label(comparison.guard), label(directory.reference)
    parts = []
    if comparison.losses:
        parts.append(_difference(comparison, twin))
    if comparison.num_rescued:
        parts.append(f"ended finite in {_seeds(comparison.num_rescued)} where the {twin} did not")
    if comparison.num_lost:
        parts.append(f"ended non-finite in {_seeds(comparison.num_lost)} where the {twin} did not")
    subject = name if name.startswith("PSS") else f"The {name}"
    return f"{subject} {', and '.join(parts)}."


def _difference(comparison: Comparison, twin: str) -> str:
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
    return f"{difference:+.3f}".replace("-", "−")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


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


def _best(run: TrainingRun) -> float:
    values = run.eval_loss.finite
    return float(values.min()) if len(values) else math.nan


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


_NUMBERS = (
    "validation\nloss",
    "training\nloss",
    "inter-\nventions",
    "NaN\nor inf",
    "overhead",
    "time",
)


def render_table(run_dir: Path) -> Table:
    """Put losses, events and overhead of every guard side by side, averaged over its seeds.

    Args:
        run_dir: a run directory, also of an interrupted run.

    Raises:
        ConfigurationError: `run_dir` holds no run.
    """
    directory = load_run_directory(run_dir)
    # Lean enough for a terminal of 80 columns.
    table = Table(
        title=_title(directory),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("guard", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    for guard in directory.guards:
        mean = mean_result([result(run) for run in directory.of(guard)])
        # `Text`, because a name in square brackets would be taken for rich's markup.
        table.add_row(Text(guard), *_cells(mean))
    return table


def _title(directory: RunDirectory) -> str:
    seeds = len(directory.seeds)
    mean = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
    state = "" if directory.status == "finished" else ", not finished"
    return f"Twin runs, {mean}{state}"


def _cells(line: Result) -> tuple[str, ...]:
    return (
        outcome(line),
        text.fixed(line.final_train_loss),
        text.count(line.num_interventions),
        text.count(line.num_nonfinite_steps),
        text.percent(line.overhead_ratio),
        text.duration(line.train_seconds),
    )
