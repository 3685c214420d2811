"""Show a training run in the terminal: its progress, and a summary at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_pss.detection.policy import Action, InterventionHistory
from hf_pss.records.events import Event, EventKind
from hf_pss.runs.folder import EVENTS_FILE
from hf_pss.runs.records_files import parse_record, read_lines
from hf_pss.trainer.callback import PSSCallback
from hf_pss.view.numbers import plural


def last_evaluation(trainer: Trainer) -> float | None:
    """Return the last validation loss; None if the run was never evaluated."""
    history = reversed(trainer.state.log_history)
    return next((row["eval_loss"] for row in history if "eval_loss" in row), None)


def closing_streak(trainer: Trainer) -> int:
    """Return the number of non-finite steps in a row at the end of the run."""
    controller = PSSCallback.of(trainer).controller
    if controller is None:
        return 0
    history = InterventionHistory.from_state_dict(controller.state_dict()["history"])
    is_last = history.last_nonfinite_step == controller.step_number
    return history.nonfinite_streak if is_last else 0


def is_broken(eval_loss: float | None) -> bool:
    """Return whether the last evaluation was not finite."""
    return eval_loss is not None and not math.isfinite(eval_loss)


def problem_of(eval_loss: float | None, nonfinite_streak: int) -> str | None:
    """Return the reason why the run failed, in a sentence; None if it did not fail."""
    if is_broken(eval_loss):
        return (
            f"The validation loss is {eval_loss}: these weights are unusable, and no model was "
            "saved."
        )
    # A single step may be a bad batch, or a loss scaler that raised its scale too far.
    if nonfinite_streak > 1:
        return (
            f"The last {nonfinite_streak} steps were not finite: nothing was learned in them, and "
            "the weights may be unusable."
        )
    return None


def render_summary(trainer: Trainer, *, train_seconds: float) -> RenderableType:
    """Put the numbers of a run that has ended into a table, and the health of its matrices below.

    Args:
        trainer: The Trainer of that run.
        train_seconds: Wall time of this session's training, with the evaluations.
    """
    history = trainer.state.log_history
    callback = PSSCallback.of(trainer)  # not before: the Trainer replaces it when it resumes
    scalars = {} if callback.report is None else callback.report.scalars
    eval_loss = last_evaluation(trainer)
    perplexity = None if eval_loss is None else math.exp(min(eval_loss, 700.0))
    overhead = None if not scalars else 100 * scalars["seconds"] / train_seconds
    observed = _count_observed(callback, Path(trainer.args.output_dir, EVENTS_FILE))
    train_loss = next((_logged_loss(row) for row in reversed(history) if "loss" in row), None)
    rows = [
        ("steps", trainer.state.global_step, "{:,}"),
        ("train loss", train_loss, "{:.4f}"),
        ("validation loss", eval_loss, "{:.4f}"),
        ("validation perplexity", perplexity, "{:.4g}"),
        ("interventions", scalars.get("interventions"), "{:,.0f}"),
        *([] if observed is None else [("would have intervened", observed, "{:,}")]),
        ("non-finite steps", scalars.get("nonfinite_steps"), "{:,.0f}"),
        ("overhead of PSS", overhead, "{:.2f} %"),
        ("model", "not saved" if is_broken(eval_loss) else trainer.args.output_dir, "{}"),
    ]
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value, form in rows:
        table.add_row(name, "–" if value is None else form.format(value))
    # This is a `Text`, because names hold square brackets, which rich would read as markup.
    health = callback.health_summary
    return table if health is None else Group(table, Text(health))


def _logged_loss(logs: Mapping[str, float]) -> float:
    # The Trainer's `logging_nan_inf_filter` writes 0.0 if no step since the last log was finite.
    is_hidden = logs["loss"] == 0.0 and logs.get("pss/nonfinite_steps", 0) > 0
    return math.nan if is_hidden else float(logs["loss"])


def _count_observed(callback: PSSCallback, path: Path) -> int | None:
    if callback.controller is None or not callback.controller.config.observe_only:
        return None
    if not path.is_file():
        return 0
    log = read_lines(path, parse_record)
    if log.num_unreadable:  # a different release wrote these lines
        return None
    return sum(
        isinstance(record, Event)
        and record.decision is Action.OBSERVE
        and record.kind is not EventKind.NON_FINITE
        for record in log.rows
    )


class ProgressDisplay(TrainerCallback):
    """Show a run inside a context: a bar, one line per evaluation, and PSS's warnings.

    Only the first process writes.

    Args:
        console: The output. The bar appears only if this is a terminal; the lines always appear.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        texts = ("{task.fields[loss]}", "{task.fields[events]}", TimeRemainingColumn())
        self._bar = Progress(
            "step {task.completed}/{task.total}", BarColumn(), *texts, console=console
        )
        self._task = self._bar.add_task("", visible=False, loss="", events="")
        self._handler = RichHandler(
            console=console, show_path=False, show_time=False, highlighter=NullHighlighter()
        )
        self._loss: float | None = None

    def __enter__(self) -> Self:
        logging.getLogger("hf_pss").addHandler(self._handler)
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        logging.getLogger("hf_pss").removeHandler(self._handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Show the bar, which starts at the step of the checkpoint if the run resumes."""
        visible = state.is_world_process_zero and not args.disable_tqdm
        self._bar.reset(
            self._task, total=state.max_steps, completed=state.global_step, visible=visible
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the newest loss and the number of interventions."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        self._loss = _logged_loss(logs)
        events = plural(logs.get("pss/interventions", 0), "intervention")
        if num_bad := logs.get("pss/nonfinite_steps", 0):
            events += f", {plural(num_bad, 'non-finite step')}"
        self._bar.update(self._task, loss=f"loss {self._loss:.3f}", events=events)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Print a line that stays."""
        if state.is_world_process_zero:
            train = "–" if self._loss is None else f"{self._loss:.3f}"
            self._console.print(
                f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  "
                f"train loss {train}  validation loss {kwargs['metrics']['eval_loss']:.3f}",
                highlight=False,
            )


def set_step_counts_(arguments: TrainingArguments, *, num_blocks: int) -> None:
    """Replace shares of all steps by numbers of steps, rounded as the Trainer does.

    A resumed run compares its arguments with those in the checkpoint. It would warn that 0.1
    differs from 80.
    """
    batches: float = num_blocks / (arguments.train_batch_size * arguments.world_size)
    whole = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    an_epoch: int = max(1, math.ceil(whole / arguments.gradient_accumulation_steps))
    total = arguments.max_steps
    if total <= 0:
        total = math.ceil(float(arguments.num_train_epochs) * an_epoch)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(arguments, name)
        if share is not None and 0 < share < 1:
            setattr(arguments, name, math.ceil(share * total))
