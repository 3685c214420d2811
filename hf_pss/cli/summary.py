"""What a training run came to: the numbers, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from transformers import Trainer

from hf_pss.integration.callback import PSSCallback

__all__ = ["Summary", "logged_loss", "pss_seconds", "render_summary", "summarise"]


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


def summarise(trainer: Trainer, *, train_seconds: float, pss_seconds_before: float) -> Summary:
    """Gather the numbers of a run that has ended.

    Args:
        trainer: It has trained.
        train_seconds: Wall time of this session's training, evaluations included.
        pss_seconds_before: What PSS had spent before this session, from its checkpoint.
    """
    history = trainer.state.log_history
    report = _callback(trainer).report
    scalars: Mapping[str, float] = report.scalars if report is not None else {}
    inside = pss_seconds(trainer) - pss_seconds_before
    return Summary(
        num_steps=trainer.state.global_step,
        train_loss=next((logged_loss(row) for row in reversed(history) if "loss" in row), None),
        eval_loss=next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
        num_interventions=_count(scalars.get("interventions")),
        num_nonfinite_steps=_count(scalars.get("nonfinite_steps")),
        overhead_ratio=inside / train_seconds if report is not None else None,
    )


def logged_loss(logs: Mapping[str, float]) -> float:
    """Return the loss of a training log; NaN where the Trainer's filter has written 0.0 for it.

    That it does where no step since the log before was finite (``logging_nan_inf_filter``).
    """
    is_hidden = logs["loss"] == 0.0 and logs.get("pss/nonfinite_steps", 0) > 0
    return math.nan if is_hidden else float(logs["loss"])


def pss_seconds(trainer: Trainer) -> float:
    """Return the seconds spent in PSS since the run began, over all its sessions."""
    controller = _callback(trainer).controller
    return controller.seconds if controller is not None else 0.0


def render_summary(summary: Summary, model_dir: Path) -> Table:
    """Put the numbers and the place of the model into a table of two columns."""
    perplexity = None if summary.eval_loss is None else math.exp(min(summary.eval_loss, 700.0))
    overhead = None if summary.overhead_ratio is None else 100 * summary.overhead_ratio
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("steps", f"{summary.num_steps:,}"),
        ("train loss", _text(summary.train_loss, "{:.4f}")),
        ("validation loss", _text(summary.eval_loss, "{:.4f}")),
        ("validation perplexity", _text(perplexity, "{:.4g}")),
        ("interventions", _text(summary.num_interventions, "{:,}")),
        ("non-finite steps", _text(summary.num_nonfinite_steps, "{:,}")),
        ("overhead of PSS", _text(overhead, "{:.2f} %")),
        ("model", str(model_dir)),
    ):
        table.add_row(name, value)
    return table


def _callback(trainer: Trainer) -> PSSCallback:
    # Looked up late: the Trainer replaces its callbacks when it resumes.
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, PSSCallback))


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
