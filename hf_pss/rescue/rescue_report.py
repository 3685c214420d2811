"""Show the result of an investigation as strict JSON, as text for a terminal, or as a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from hf_pss.inspection.post_mortem import post_mortem_json, render_post_mortem
from hf_pss.records.strict_json import finite_or_none, visible
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.command import ResumePlan
from hf_pss.rescue.investigate import Investigation
from hf_pss.rescue.repair import Written
from hf_pss.runs.folder import write_whole
from hf_pss.runs.records_files import RunLog
from hf_pss.view.numbers import plural
from hf_pss.view.tables import lean_table, marks, sparkline

if TYPE_CHECKING:
    from hf_pss.view.canvas import Axes

SCHEMA_VERSION = 1
_WIDTH = 60
# Of each verdict: the style in a terminal, and the colour in a figure.
_STYLES = {
    "healthy": ("green", "#009E73"),
    "unopened": ("yellow", "#E69F00"),
    "suspect": ("yellow", "#E69F00"),
    "incomplete": ("red", "#D55E00"),
    "damaged": ("bold red", "#D55E00"),
}
_LOSS, _EVAL_LOSS, _NORM, _FAILURE = "#0072B2", "#009E73", "#555555", "#D55E00"
_KINDS = {
    "non_finite": "NOT FINITE",
    "spike": "SPIKE",
    "slow_damage": "SLOW DAMAGE",
    "collapse": "COLLAPSE",
}


def as_json(found: Investigation, plan: ResumePlan | None, written: Any = None) -> dict[str, Any]:
    """Return the result as data that JSON can hold. NaN and inf become None.

    Args:
        found: The investigation.
        plan: How to resume the run, or None if no checkpoint was chosen.
        written: A description of the copy that `--write` made, as plain data.
    """
    choice, log = found.choice, found.log
    return {
        "version": SCHEMA_VERSION,
        "run": str(found.run_dir),
        "log": log and {"path": str(log.path), "step": log.global_step, "rows": len(log.rows)},
        "unreadable": list(found.unreadable),
        "failure": found.failure and asdict(found.failure),
        "notes": list(found.notes),
        "post_mortem": found.post_mortem and post_mortem_json(found.post_mortem),
        "checkpoints": [_checkpoint(one) for one in found.checkpoints],
        "chosen": None if choice.chosen is None else str(choice.chosen.path),
        "reason": choice.reason,
        "is_last_resort": choice.is_last_resort,
        "passed_over": [
            {"path": str(one.path), "reason": reason} for one, reason in choice.passed_over
        ],
        "resume": plan
        and {
            "command": None if plan.command is None else list(plan.command),
            "options": list(plan.options),
            "remarks": list(plan.remarks),
        },
        "written": written,
    }


def _checkpoint(one: CheckpointReport) -> dict[str, Any]:
    inspection = one.inspection
    worst = inspection.matrices[0] if inspection is not None and inspection.matrices else None
    return {
        "path": str(one.path),
        "step": one.step,
        "written": one.written.isoformat(),
        "num_bytes": one.num_bytes,
        "layout": one.layout,
        "verdict": one.verdict,
        "complete": not one.missing,
        "finite": None if inspection is None else inspection.is_finite,
        "missing": list(one.missing),
        "problem": one.problem,
        "remarks": list(one.remarks),
        "num_findings": None if inspection is None else inspection.num_findings,
        "worst_matrix": worst
        and {
            "name": worst.health.name,
            "stable_rank": finite_or_none(worst.health.stable_rank),
            "sigma1": finite_or_none(worst.health.sigma1),
            "findings": [finding.text for finding in worst.findings],
        },
    }


def render_investigation(found: Investigation) -> RenderableType:
    """Show how the run failed, its checkpoints, and which one was chosen and why."""
    spike = [] if found.post_mortem is None else [Text(), *render_post_mortem(found.post_mortem)]
    return Group(*_course(found), *spike, Text(), *_checkpoints(found), Text(), *_choice(found))


def render_plan(plan: ResumePlan) -> RenderableType:
    """Show the command on a separate line, so that it can be copied, and the remarks on it."""
    # `visible` would shorten a long command.
    shell = "".join(c if c.isprintable() else visible(c) for c in plan.shell)
    lines = [Text("To continue:", style="bold"), Text(f"  {shell}")]
    if not plan.is_own_launch:
        lines += [Text("or in Python:"), *(Text(f"  {line}") for line in plan.python.splitlines())]
    return Group(*lines, *(Text(f"· {remark}", style="dim") for remark in plan.remarks))


def render_written(written: Written) -> RenderableType:
    """Show where the copy is, and how it differs from the checkpoint."""
    head = f"Written: {visible(written.path)}, to continue from step {written.step:,}."
    return Group(Text(head, "bold"), *(Text(f"  {remark}") for remark in written.remarks))


def _course(found: Investigation) -> Iterator[RenderableType]:
    log, failure = found.log, found.failure
    for line in found.unreadable:
        yield Text(f"Cannot be read: {line}", style="red")
    if log is None:
        yield Text("No log could be read, so the time and kind of failure are unknown.", "yellow")
        return
    end = "" if not log.max_steps else f" of {log.max_steps:,}"
    yield Text(
        f"{visible(found.run_dir)}: {plural(len(log.rows), 'logged row')} up to step "
        f"{log.global_step:,}{end}"
    )
    if failure is None:
        yield Text("No failure was found in the log.", style="green")
    else:
        # The text names the step whose loss shows the damage, which an earlier update has caused.
        onset = failure.onset_step
        since = f"the update of step {onset:,} on" if onset else "the beginning"
        yield Text(f"{_KINDS[failure.kind]}, from {since}.", style="bold red")
        yield Text(failure.text)
    for note in found.notes:
        yield Text(note, style="dim")
    rows = log.training
    if len(rows) < 2:
        return
    steps = (rows[0].step, rows[-1].step)
    width = min(_WIDTH, len(rows))
    losses = sparkline([(row.step, row.loss) for row in rows], steps=steps, width=width)
    yield Text(f"loss           {losses}")
    norms = [(row.step, row.grad_norm) for row in rows]
    if any(norm is not None for _, norm in norms):
        yield Text(f"gradient norm  {sparkline(norms, steps=steps, width=width)}")
    saved = [one.step for one in found.checkpoints]
    yield Text(f"checkpoints    {marks(saved, '▲', over=steps, width=width)}")
    if failure is not None:
        where = min(max(failure.onset_step, steps[0]), steps[1])
        yield Text(f"failure        {marks([where], '!', over=steps, width=width)}", style="red")


def _checkpoints(found: Investigation) -> Iterator[RenderableType]:
    if not found.checkpoints:
        yield Text("No checkpoint.", style="red")
        return
    table = lean_table(["checkpoint"], ["written (UTC)", "MiB"], ["verdict", "findings"])
    chosen = None if found.choice.chosen is None else found.choice.chosen.path
    for one in reversed(found.checkpoints):
        worst = one.problem or one.worst
        findings = [*([worst] if worst else []), *one.missing, *one.remarks]
        table.add_row(
            Text(f"{'→' if one.path == chosen else ' '} {visible(one.path.name)}"),
            f"{one.written:%Y-%m-%d %H:%M}",
            f"{one.num_bytes / 2**20:,.1f}",
            Text(one.verdict, style=_STYLES[one.verdict][0]),
            Text("; ".join(findings) or "complete, every number finite"),
        )
    yield table


def _choice(found: Investigation) -> Iterator[Text]:
    choice = found.choice
    if choice.chosen is None:
        yield Text(choice.reason, style="bold red")
        if any(one.inspection is not None and one.problem is None for one in found.checkpoints):
            yield Text(
                "Some checkpoints nevertheless have finite weights. You can start a new run from "
                "them with from_pretrained of their folder."
            )
        return
    yield Text(f"Chosen: {visible(choice.chosen.path.name)}, {choice.reason}.", style="bold")
    for one, reason in choice.passed_over:
        yield Text(f"  passed over {visible(one.path.name)}: {reason}")


def draw_course(found: Investigation, path: Path) -> None:
    """Write the figure as a PNG file.

    Args:
        found: The findings about a run. If it has no readable log, only its checkpoints are drawn.
        path: The file to write.

    Raises:
        OSError: The file cannot be written.
    """
    from hf_pss.view import canvas  # needs an extra

    with canvas.style():
        figure = canvas.new_figure(8.0, 4.6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _curve(top, found.log, "loss", "loss", _LOSS)
        _curve(top, found.log, "eval_loss", "validation loss", _EVAL_LOSS)
        _curve(bottom, found.log, "grad_norm", "gradient norm", _NORM)
        failure, chosen = found.failure, found.choice.chosen
        for axes in (top, bottom):
            for one in found.checkpoints:
                axes.axvline(one.step, color=_STYLES[one.verdict][1], lw=0.8, ls=":")
            if failure is not None:
                axes.axvline(failure.onset_step, color=_FAILURE, lw=1.5)
            if chosen is not None:
                axes.axvline(chosen.step, color=_STYLES[chosen.verdict][1], lw=1.5, ls="--")
        title = (
            "no failure found" if failure is None else f"{failure.kind}, step {failure.onset_step}"
        )
        title += "" if chosen is None else f"; continue from step {chosen.step}"
        top.set_title(f"{title} (dotted: checkpoints)".replace("_", " "))
        norms = [row.grad_norm for row in (found.log.rows if found.log else ())]
        if any(norm is not None and 0 < norm < math.inf for norm in norms):
            canvas.use_log_scale(bottom)
        top.set_ylabel("loss")
        bottom.set_ylabel("gradient norm")
        bottom.set_xlabel("step")
        if top.get_legend_handles_labels()[0]:
            top.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, canvas.to_png(figure))


def _curve(axes: Axes, log: RunLog | None, field: str, label: str, colour: str) -> None:
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
