"""Load the labelled training logs, and write them as a Trainer would have logged them.

The runs were logged at each step. A Trainer that logs less often logs numbers of the same run that
follow from these: the training does not depend on how often it is logged. `logged` therefore
derives the log of any interval. It repeats what `transformers.Trainer` 5.23 does:

- The Trainer adds the loss of each step to a sum, divides the sum by the number of steps since the
  last row, and sets the sum to 0 by subtracting it from itself.
- With ``logging_nan_inf_filter``, which is the default, it adds the sum divided by the number of
  steps so far in place of a loss that is NaN or inf. If no step of the interval was finite, the
  logged loss is 0.
- Without the filter, the sum is NaN from the first NaN or inf on: NaN less NaN is NaN. All later
  rows are NaN, although the losses of later steps may be finite.
- ``grad_norm`` and ``learning_rate`` are those of the last step of the interval.
- The steps after the last full interval are not logged.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["INTERVALS", "VERDICTS", "Label", "LabelledLog", "Part", "labelled_logs", "logged"]

FOLDER = Path(__file__).parent / "labelled_logs"
INTERVALS = (1, 5, 20)
VERDICTS = (
    "sound",
    "spike_recovered",
    "non_finite",
    "spike_lasting",
    "diverged",
    "collapse",
    "slow_damage",
)

Part = Literal["tune", "report"]


@dataclass(frozen=True, slots=True)
class Label:
    """The truth about a run. ``labelled_logs/README.md`` describes the verdicts."""

    verdict: str
    began: int | None
    """The first step whose batch or update did the damage."""
    tolerance: int
    """The number of steps by which an answer may differ from `began`, besides one interval."""
    accepted: tuple[str, ...]
    """The words of `hf_pss.rescue.diagnosis` that are right; none for a run without a failure."""
    may_go_back: bool
    may_smooth: bool
    counts: bool
    """False for a run whose verdict is ambiguous. Such a run is kept out of all counts."""
    why: str

    @property
    def is_failure(self) -> bool:
        """Whether the run has failed and did not recover."""
        return bool(self.accepted)


@dataclass(frozen=True, slots=True)
class LabelledLog:
    """The log of one run, with its label."""

    name: str
    kind: str
    scenario: str
    part: Part
    vocab_size: int | None
    """The number in the model's config.json, or None if the model has no vocabulary."""
    nan_filter: bool
    steps_per_epoch: int
    losses: tuple[float, ...]
    """The loss of each step. It may be NaN or inf."""
    grad_norms: tuple[float, ...]
    learning_rates: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    """The loss on fixed data after the given number of updates; for GRPO, minus the reward."""
    logged: tuple[float, ...] | None
    """The losses that the Trainer itself has logged at each step. Few runs have them."""
    label: Label

    def rows(self, interval: int = 1, *, scale: float = 1.0) -> list[dict[str, float]]:
        """Return the rows of ``log_history`` for a logging interval, with the loss times `scale`.

        The gradient norm is scaled, too, as it would be in a run with such a loss.
        """
        losses = logged(self.losses, interval, nan_filter=self.nan_filter)
        found = []
        for number, loss in enumerate(losses, start=1):
            step = number * interval
            found.append(
                {
                    "epoch": step / self.steps_per_epoch,
                    "grad_norm": self.grad_norms[step - 1] * scale,
                    "learning_rate": self.learning_rates[step - 1],
                    "loss": loss * scale,
                    "step": step,
                }
            )
        return found

    def state(self, interval: int = 1, *, scale: float = 1.0) -> dict[str, Any]:
        """Return the content of a trainer_state.json."""
        return {
            "global_step": len(self.losses),
            "max_steps": len(self.losses),
            "logging_steps": interval,
            "log_history": self.rows(interval, scale=scale),
        }

    def write(self, folder: Path, interval: int = 1, *, scale: float = 1.0) -> Path:
        """Write a trainer_state.json into a folder and return its path."""
        path = folder / "trainer_state.json"
        path.write_text(json.dumps(self.state(interval, scale=scale)), encoding="utf-8")
        return path


def logged(losses: Sequence[float], interval: int, *, nan_filter: bool = True) -> list[float]:
    """Return the losses that a Trainer logs for the losses of all steps.

    >>> logged([4.0, 2.0, float("nan"), 3.0], 2)
    [3.0, 1.5]
    >>> logged([4.0, float("nan"), float("nan")], 1)
    [4.0, 0.0, 0.0]
    >>> logged([4.0, float("nan"), 3.0], 1, nan_filter=False)
    [4.0, nan, nan]
    """
    rows, total = [], 0.0
    for step, loss in enumerate(losses):
        done = step % interval
        total += total / (1 + done) if nan_filter and not math.isfinite(loss) else loss
        if done == interval - 1:
            rows.append(total / interval)
            total -= total
    return rows


@cache
def labelled_logs(part: Part | None = None, *, ambiguous: bool = False) -> list[LabelledLog]:
    """Return the runs of a part, or of both, without the ambiguous ones unless they are wanted."""
    found = []
    for path in sorted(FOLDER.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [_log_of(json.loads(line)) for line in lines]
    chosen = [one for one in found if part in (None, one.part)]
    return [one for one in chosen if ambiguous or one.label.counts]


def _log_of(row: dict[str, Any]) -> LabelledLog:
    label = {**row["label"], "accepted": tuple(row["label"]["accepted"])}
    return LabelledLog(
        name=row["name"],
        kind=row["kind"],
        scenario=row["scenario"],
        part=row["part"],
        vocab_size=row["vocab_size"],
        nan_filter=row["nan_filter"],
        steps_per_epoch=row["steps_per_epoch"],
        losses=tuple(row["loss"]),
        grad_norms=tuple(row["grad_norm"]),
        learning_rates=tuple(row["learning_rate"]),
        evaluations=tuple((step, value) for step, value in row["evaluations"]),
        logged=None if row["logged"] is None else tuple(row["logged"]),
        label=Label(**label),
    )
