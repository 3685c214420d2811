"""What a training run came to: the numbers, the table that shows them, and what is wrong.

Progress of a training run in the terminal: a bar, a line an evaluation, and PSS's warnings.

How many steps a run takes, and its rhythms in steps where they were given as shares.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pss.detection.policy import Action, InterventionHistory
from hf_pss.records.events import Event, EventKind
from hf_pss.runs.folder import EVENTS_FILE
from hf_pss.runs.records_files import parse_record, read_lines
from hf_pss.trainer.callback import PSSCallback

__all__ = [
    "ProgressDisplay",
    "SessionClock",
    "Summary",
    "count_steps",
    "counted",
    "logged_loss",
    "render_summary",
    "set_rhythms_",
    "summarise",
]


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run; None where there is no such number."""

    num_steps: int
    train_loss: float | None
    """The last one logged: the mean over the steps since the log before."""
    eval_loss: float | None
    num_interventions: int | None
    num_nonfinite_steps: int | None
    overhead_ratio: float | None
    """Seconds of PSS over seconds of training, in this session."""
    num_observed: int | None
    """Events that would have been interventions; None unless the run only observed."""
    nonfinite_streak: int
    """Length of the row of non-finite steps with which the run ended."""
    health: str | None = None
    """The matrices that look ill, as text; None where nothing was measured."""

    @property
    def has_broken_weights(self) -> bool:
        """Whether the last evaluation was not finite."""
        return self.eval_loss is not None and not math.isfinite(self.eval_loss)

    @property
    def problem(self) -> str | None:
        """What makes the run a failure, in a sentence, if anything does."""
        if self.has_broken_weights:
            return (
                f"The validation loss is {self.eval_loss}: these weights are unusable, and no "
                "model was saved."
            )
        # One alone may be a batch, or a loss scaler that tries its limit.
        if self.nonfinite_streak > 1:
            return (
                f"The last {self.nonfinite_streak} steps were not finite: nothing was learned in "
                "them, and the weights may be unusable."
            )
        return None


class SessionClock(TrainerCallback):
    """Notes what PSS had spent when this session's first step began: earlier sessions' seconds.

    At that moment, because the Trainer may order callbacks anew when it resumes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note it once."""
        if self._before is None:
            self._before = _pss_seconds(self._trainer)

    @property
    def pss_seconds(self) -> float:
        """Seconds of PSS in this session."""
        return 0.0 if self._before is None else _pss_seconds(self._trainer) - self._before


def summarise(trainer: Trainer, *, train_seconds: float, pss_seconds: float) -> Summary:
    """Gather the numbers of a run that has ended.

    Args:
        trainer: It has trained.
        train_seconds: Wall time of this session's training, evaluations included.
        pss_seconds: Seconds of PSS in this session.
    """
    history = trainer.state.log_history
    report = _callback(trainer).report
    scalars: Mapping[str, float] = report.scalars if report is not None else {}
    return Summary(
        num_steps=trainer.state.global_step,
        train_loss=next((logged_loss(row) for row in reversed(history) if "loss" in row), None),
        eval_loss=next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
        num_interventions=_count(scalars.get("interventions")),
        num_nonfinite_steps=_count(scalars.get("nonfinite_steps")),
        overhead_ratio=pss_seconds / train_seconds if report is not None else None,
        num_observed=_count_observed(trainer),
        nonfinite_streak=_closing_streak(trainer),
        health=_callback(trainer).health_summary,
    )


def logged_loss(logs: Mapping[str, float]) -> float:
    """Return the loss of a training log; NaN where the Trainer's filter has written 0.0 for it.

    That it does where no step since the log before was finite (``logging_nan_inf_filter``).
    """
    is_hidden = logs["loss"] == 0.0 and logs.get("pss/nonfinite_steps", 0) > 0
    return math.nan if is_hidden else float(logs["loss"])


def counted(number: float, what: str) -> str:
    """Return a number and what it counts, with an s where there is not one of them."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def render_summary(summary: Summary, model_dir: Path) -> RenderableType:
    """Put the numbers and the place of the model into a table of two columns; health below it."""
    perplexity = None if summary.eval_loss is None else math.exp(min(summary.eval_loss, 700.0))
    overhead = None if summary.overhead_ratio is None else 100 * summary.overhead_ratio
    observed = (
        [("would have intervened", f"{summary.num_observed:,}")]
        if summary.num_observed is not None
        else []
    )
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("steps", f"{summary.num_steps:,}"),
        ("train loss", _text(summary.train_loss, "{:.4f}")),
        ("validation loss", _text(summary.eval_loss, "{:.4f}")),
        ("validation perplexity", _text(perplexity, "{:.4g}")),
        ("interventions", _text(summary.num_interventions, "{:,}")),
        *observed,
        ("non-finite steps", _text(summary.num_nonfinite_steps, "{:,}")),
        ("overhead of PSS", _text(overhead, "{:.2f} %")),
        ("model", "not saved" if summary.has_broken_weights else str(model_dir)),
    ):
        table.add_row(name, value)
    # `Text`: names hold square brackets, which rich takes for markup.
    return table if summary.health is None else Group(table, Text(summary.health))


def _callback(trainer: Trainer) -> PSSCallback:
    # Looked up late: the Trainer replaces its callbacks when it resumes.
    return PSSCallback.of(trainer)


def _pss_seconds(trainer: Trainer) -> float:
    controller = _callback(trainer).controller
    return controller.seconds if controller is not None else 0.0


def _closing_streak(trainer: Trainer) -> int:
    controller = _callback(trainer).controller
    if controller is None:
        return 0
    history = InterventionHistory.from_state_dict(controller.state_dict()["history"])
    is_last = history.last_nonfinite_step == controller.step_number
    return history.nonfinite_streak if is_last else 0


def _count_observed(trainer: Trainer) -> int | None:
    controller = _callback(trainer).controller
    if controller is None or not controller.config.observe_only:
        return None
    log = read_lines(Path(trainer.args.output_dir, EVENTS_FILE), parse_record)
    if log.num_unreadable:  # lines of another release
        return None
    return sum(
        isinstance(record, Event)
        and record.decision is Action.OBSERVE
        and record.kind is not EventKind.NON_FINITE
        for record in log.rows
    )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


_COLUMNS = ("step {task.completed}/{task.total}", "{task.fields[loss]}", "{task.fields[events]}")


class ProgressDisplay(TrainerCallback):
    """Shows a run while it is entered as a context; silent on all processes but the first.

    Args:
        console: Where to; a bar appears on a terminal only, lines everywhere.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        left, *right = (TextColumn(column) for column in _COLUMNS)
        self._bar = Progress(left, BarColumn(), *right, TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", visible=False, loss="", events="")
        self._handler = RichHandler(
            console=console, show_path=False, show_time=False, highlighter=NullHighlighter()
        )
        self._loss: float | None = None

    def __enter__(self) -> Self:
        logging.getLogger("hf_pss").addHandler(self._handler)
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        logging.getLogger("hf_pss").removeHandler(self._handler)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Show the bar, at the step of the checkpoint where the run resumes."""
        visible = state.is_world_process_zero and not args.disable_tqdm
        self._bar.reset(
            self._task, total=state.max_steps, completed=state.global_step, visible=visible
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move on."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss, and how often PSS acted."""
        if not logs or "loss" not in logs:
            return
        self._loss = logged_loss(logs)
        events = counted(logs.get("pss/interventions", 0), "intervention")
        if num_bad := logs.get("pss/nonfinite_steps", 0):
            events += f", {counted(num_bad, 'non-finite step')}"
        self._bar.update(self._task, loss=f"loss {self._loss:.3f}", events=events)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave a line behind."""
        if state.is_world_process_zero and metrics and "eval_loss" in metrics:
            train = "–" if self._loss is None else f"{self._loss:.3f}"
            self._console.print(
                f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  "
                f"train loss {train}  validation loss {metrics['eval_loss']:.3f}",
                highlight=False,
            )


def set_rhythms_(arguments: TrainingArguments, *, num_blocks: int) -> None:
    """Turn shares of all steps into steps, as the Trainer does, but in the arguments.

    There a resumed run compares them with its checkpoint's, and would warn of 0.1 against 80.
    """
    total = count_steps(arguments, num_blocks=num_blocks)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(arguments, name)
        if share is not None and 0 < share < 1:
            setattr(arguments, name, math.ceil(share * total))


def count_steps(arguments: TrainingArguments, *, num_blocks: int) -> int:
    """Return how many optimizer steps a run over so many blocks takes."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches: float = num_blocks / (arguments.train_batch_size * arguments.world_size)
    whole = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    a_pass: int = max(1, math.ceil(whole / arguments.gradient_accumulation_steps))
    epochs: float = arguments.num_train_epochs
    total: int = math.ceil(epochs * a_pass)
    return total
