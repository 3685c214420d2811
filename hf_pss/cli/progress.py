"""Progress of a training run in the terminal: a bar, a line an evaluation, and PSS's warnings."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pss.cli.summary import counted, logged_loss

__all__ = ["ProgressDisplay"]

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
