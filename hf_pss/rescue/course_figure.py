"""Draw the loss and the gradient norm of a run, with its failure and its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

from hf_pss.rescue.investigate import Investigation
from hf_pss.runs.log import RunLog
from hf_pss.view import canvas

__all__ = ["draw_course"]

_COLOURS = {
    "healthy": "#009E73",
    "unopened": "#E69F00",
    "suspect": "#E69F00",
    "incomplete": "#D55E00",
    "damaged": "#D55E00",
}
_LOSS, _EVAL_LOSS, _NORM, _FAILURE = "#0072B2", "#009E73", "#555555", "#D55E00"


def draw_course(found: Investigation, path: Path) -> None:
    """Write the figure as a PNG file.

    Args:
        found: The findings about a run. If it has no readable log, only its checkpoints are drawn.
        path: The file to write.

    Raises:
        OSError: The file cannot be written.
    """
    with canvas.style():
        figure = canvas.new_figure(8.0, 4.6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _curve(top, found.log, "loss", "loss", _LOSS)
        _curve(top, found.log, "eval_loss", "validation loss", _EVAL_LOSS)
        _curve(bottom, found.log, "grad_norm", "gradient norm", _NORM)
        failure, chosen = found.failure, found.choice.chosen
        for axes in (top, bottom):
            for one in found.checkpoints:
                axes.axvline(one.step, color=_COLOURS[one.verdict], lw=0.8, ls=":")
            if failure is not None:
                axes.axvline(failure.onset_step, color=_FAILURE, lw=1.5)
            if chosen is not None:
                axes.axvline(chosen.step, color=_COLOURS[chosen.verdict], lw=1.5, ls="--")
        title = (
            "no failure found" if failure is None else f"{failure.kind}, step {failure.onset_step}"
        )
        title += "" if chosen is None else f"; continue from step {chosen.step}"
        top.set_title(f"{title} (dotted: checkpoints)".replace("_", " "))
        norms = [row.grad_norm for row in (found.log.rows if found.log else ())]
        if any(norm is not None and 0 < norm < math.inf for norm in norms):
            canvas.use_log_scale(bottom)
        top.set_ylabel("loss, nats")
        bottom.set_ylabel("gradient norm")
        bottom.set_xlabel("step")
        if top.get_legend_handles_labels()[0]:
            top.legend()
        canvas.save_png(figure, path)


def _curve(axes: canvas.Axes, log: RunLog | None, field: str, label: str, colour: str) -> None:
    rows = () if log is None else log.rows
    points = [(row.step, value) for row in rows if (value := getattr(row, field)) is not None]
    sound = [(step, value) for step, value in points if math.isfinite(value)]
    if sound:
        axes.plot(*zip(*sound, strict=True), color=colour, label=label)
    bad = [step for step, value in points if not math.isfinite(value)]
    if bad:
        level = max((value for _, value in sound), default=1.0)
        marks = [level] * len(bad)
        axes.plot(bad, marks, "x", color=_FAILURE, label=f"{label} NaN or inf")
