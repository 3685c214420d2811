"""An investigation as strict JSON: what is NaN or inf becomes null.

An investigation for a terminal: what happened, the checkpoints, the choice, the command.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from hf_pss.records.strict_json import visible
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.command import ResumePlan
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.investigate import Investigation
from hf_pss.rescue.repair import Written
from hf_pss.runs.log import History
from hf_pss.view.tables import lean_table, marks, sparkline

__all__ = ["SCHEMA_VERSION", "as_json", "render_investigation", "render_plan", "render_written"]

SCHEMA_VERSION = 1


def as_json(found: Investigation, plan: ResumePlan | None, written: Any = None) -> dict[str, Any]:
    """Return plain data.

    Args:
        found: The investigation.
        plan: How to go on; None where no checkpoint was chosen.
        written: What `--write` did, as plain data.
    """
    choice, history, diagnosis = found.choice, found.history, found.diagnosis
    failure = None if diagnosis is None else diagnosis.failure
    return {
        "version": SCHEMA_VERSION,
        "run": str(found.run_dir),
        "log": None
        if history is None
        else {"path": str(history.path), "step": history.global_step, "rows": len(history.rows)},
        "unreadable": list(found.unreadable),
        "failure": None
        if failure is None
        else {
            "kind": failure.kind,
            "onset_step": failure.onset_step,
            "noticed_step": failure.noticed_step,
            "text": failure.text,
        },
        "notes": [] if diagnosis is None else list(diagnosis.notes),
        "checkpoints": [_checkpoint(one) for one in found.checkpoints],
        "chosen": None if choice.chosen is None else str(choice.chosen.path),
        "reason": choice.reason,
        "is_last_resort": choice.is_last_resort,
        "passed_over": [
            {"path": str(one.path), "reason": reason} for one, reason in choice.passed_over
        ],
        "resume": None
        if plan is None
        else {
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
        "worst_matrix": None
        if worst is None
        else {
            "name": worst.health.name,
            "stable_rank": _finite(worst.health.stable_rank),
            "sigma1": _finite(worst.health.sigma1),
            "findings": [finding.text for finding in worst.findings],
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_WIDTH = 60
_STYLES = {
    "healthy": "green",
    "unopened": "yellow",
    "suspect": "yellow",
    "incomplete": "red",
    "damaged": "bold red",
}
_KINDS = {
    "non_finite": "NOT FINITE",
    "spike": "SPIKE",
    "slow_damage": "SLOW DAMAGE",
    "collapse": "COLLAPSE",
}


def render_investigation(found: Investigation) -> RenderableType:
    """Put first how it failed, then the checkpoints, then which was chosen and why."""
    return Group(*_course(found), Text(), *_checkpoints(found), Text(), *_choice(found))


def render_plan(plan: ResumePlan) -> RenderableType:
    """The command, on a line of its own that can be copied, and what to know about it."""
    lines = [Text("To go on:", style="bold"), Text(f"  {visible_command(plan.shell)}")]
    if plan.command is None and plan.train_words is None:
        lines += [Text("or in Python:"), *(Text(f"  {line}") for line in plan.python.splitlines())]
    return Group(*lines, *(Text(f"· {remark}", style="dim") for remark in plan.remarks))


def render_written(written: Written) -> RenderableType:
    """What the copy is, and how it differs from the checkpoint."""
    head = Text(f"Written: {visible(written.path)}, to go on from step {written.step:,}.", "bold")
    return Group(head, *(Text(f"  {remark}") for remark in written.remarks))


def _course(found: Investigation) -> Iterator[RenderableType]:
    history, diagnosis = found.history, found.diagnosis
    for line in found.unreadable:
        yield Text(f"Cannot be read: {line}", style="red")
    if history is None or diagnosis is None:
        yield Text("No log could be read: when and how it failed is not known.", style="yellow")
        return
    end = "" if not history.max_steps else f" of {history.max_steps:,}"
    yield Text(
        f"{visible(found.run_dir)}: {len(history.rows):,} logged rows up to step "
        f"{history.global_step:,}{end}"
    )
    failure = diagnosis.failure
    if failure is None:
        yield Text("No failure was found in the log.", style="green")
    else:
        yield Text(f"{_KINDS[failure.kind]} at step {failure.onset_step:,}.", style="bold red")
        yield Text(failure.text)
    for note in diagnosis.notes:
        yield Text(note, style="dim")
    yield from _curves(history, failure, [one.step for one in found.checkpoints])


def _curves(history: History, failure: Failure | None, saved: list[int]) -> Iterator[Text]:
    rows = history.training
    if len(rows) < 2:
        return
    steps = (rows[0].step, rows[-1].step)
    width = min(_WIDTH, len(rows))
    losses = sparkline([(row.step, row.loss) for row in rows], steps=steps, width=width)
    yield Text(f"loss           {losses}")
    norms = [(row.step, row.grad_norm) for row in rows]
    if any(norm is not None for _, norm in norms):
        yield Text(f"gradient norm  {sparkline(norms, steps=steps, width=width)}")
    yield Text(f"checkpoints    {marks(saved, '▲', over=steps, width=width)}")
    if failure is not None:
        where = min(max(failure.onset_step, steps[0]), steps[1])
        yield Text(f"failure        {marks([where], '!', over=steps, width=width)}", style="red")


def _checkpoints(found: Investigation) -> Iterator[RenderableType]:
    if not found.checkpoints:
        yield Text("No checkpoint.", style="red")
        return
    table = lean_table(["checkpoint"], ["written (UTC)", "MiB"], ["verdict", "what is known"])
    chosen = None if found.choice.chosen is None else found.choice.chosen.path
    for one in reversed(found.checkpoints):
        mark = "→ " if one.path == chosen else "  "
        table.add_row(
            Text(f"{mark}{visible(one.path.name)}"),
            f"{one.written:%Y-%m-%d %H:%M}",
            f"{one.num_bytes / 2**20:,.1f}",
            Text(one.verdict, style=_STYLES[one.verdict]),
            Text(_known(one)),
        )
    yield table


def _known(one: CheckpointReport) -> str:
    worst = one.problem or one.worst
    said = [*([worst] if worst else []), *one.missing, *one.remarks]
    return "; ".join(said) or "complete, every number finite"


def _choice(found: Investigation) -> Iterator[Text]:
    choice = found.choice
    if choice.chosen is None:
        yield Text(choice.reason, style="bold red")
        if any(one.inspection is not None and one.problem is None for one in found.checkpoints):
            yield Text(
                "Weights that are finite are there all the same: from_pretrained of such a folder "
                "begins another run with them."
            )
    else:
        yield Text(f"Chosen: {visible(choice.chosen.path.name)}, {choice.reason}.", style="bold")
    for one, reason in choice.passed_over if choice.chosen is not None else ():
        yield Text(f"  passed over {visible(one.path.name)}: {reason}")


def visible_command(shell: str) -> str:
    """Escape what a terminal would obey; a command is never cut, as `visible` would."""
    return "".join(c if c.isprintable() else visible(c) for c in shell)
