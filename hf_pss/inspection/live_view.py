"""A run's state for people: a screen that is drawn anew, or plain lines as things happen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_pss.records.messages import Alert, AlertLevel, alert_of
from hf_pss.records.strict_json import visible
from hf_pss.runs.follow import Logs, Ranks, RunState
from hf_pss.view.numbers import duration, plural

__all__ = ["plain_lines", "render"]

_STYLES = {AlertLevel.INFO: "", AlertLevel.WARN: "yellow", AlertLevel.ERROR: "bold red"}
_STALE_SECONDS = 600.0


def render(state: RunState, *, now: float, num_events: int, num_matrices: int) -> RenderableType:
    """Return the screen.

    Args:
        state: The last look.
        now: As `time.time`.
        num_events: The most events to show, the newest last.
        num_matrices: The most matrices to show, the lowest stable rank first.
    """
    if state.is_empty:
        return Text(f"{visible(state.folder)}: nothing has been written yet.", style="dim")
    return Group(
        _head(state, now),
        *_log_lines(state),
        *_event_lines(state, num_events),
        *_rank_lines(state, num_matrices),
        *_foot(state),
    )


def plain_lines(before: RunState | None, state: RunState) -> Iterator[str]:
    """Yield what is new since the look before: logs, events with their advice, readings."""
    if state.has_resumed:
        yield "The run has resumed from a checkpoint: what came after it is superseded."
    if state.logs is not None and (before is None or before.logs != state.logs):
        yield f"{_steps(state.logs, state.max_steps)}: {_numbers(state.logs)}"
    for record in state.fresh_events:
        alert = alert_of(record)
        yield f"{alert.level.name}: {_sentences(alert)} {visible(alert.advice)}"
    if state.ranks is not None and (before is None or before.ranks != state.ranks):
        yield _lowest(state.ranks)


def _head(state: RunState, now: float) -> Text:
    age = max(0.0, now - (state.modified_seconds or now))
    text = Text(visible(state.folder), style="bold")
    if state.has_ended:
        return text.append("  the run has ended", style="green")
    style = "yellow" if age > _STALE_SECONDS else "dim"
    return text.append(f"  last write {duration(float(round(age)))} ago", style=style)


def _log_lines(state: RunState) -> Iterator[Text]:
    if state.logs is None:
        yield Text("No training log yet: trainer_state.json comes with a checkpoint.", style="dim")
        return
    logs = state.logs
    is_broken = any(v is not None and not math.isfinite(v) for v in (logs.loss, logs.grad_norm))
    line = f"{_steps(logs, state.max_steps)}  {_numbers(logs)}"
    yield Text(line, style="bold red" if is_broken else "").append(
        f"  ({visible(logs.source)})", style="dim"
    )


def _event_lines(state: RunState, num_events: int) -> Iterator[Text]:
    if not state.num_events:
        yield Text("No event.", style="dim")
        return
    hidden = state.num_events - min(num_events, len(state.events))
    more = f", the newest {min(num_events, len(state.events))}" if hidden > 0 else ""
    counts = (
        plural(state.num_events, "event"),
        plural(state.num_interventions, "intervention"),
    )
    yield Text(f"{', '.join(counts)}{more}:")
    alerts = [alert_of(record) for record in state.events[-num_events:]]
    for alert in alerts:
        yield Text(f"  {_sentences(alert)}", style=_STYLES[alert.level])
    if alerts:
        yield Text(f"  {visible(alerts[-1].advice)}", style="italic")


def _rank_lines(state: RunState, num_matrices: int) -> Iterator[RenderableType]:
    if state.ranks is None or not state.ranks.by_matrix:
        why = "none could be read" if state.num_unreadable else "set health to have them"
        yield Text(f"No stable ranks: {why}.", style="dim")
        return
    first = state.first_ranks
    has_past = first is not None and first.step < state.ranks.step
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"lowest stable ranks, step {state.ranks.step:,}", overflow="fold")
    table.add_column("now", justify="right")
    if first is not None and has_past:
        table.add_column(f"step {first.step:,}", justify="right")
    names = _worst(state.ranks)
    for name in names[:num_matrices]:
        past = [_text(first.by_matrix.get(name))] if first is not None and has_past else []
        value = state.ranks.by_matrix[name]
        style = "bold red" if math.isnan(value) else ""
        shown = visible(name).replace(".weight", "")
        table.add_row(Text(shown), Text(_text(value), style=style), *past)
    yield table
    hidden = len(names) - num_matrices
    if hidden > 0:
        yield Text(f"{hidden:,} more; --lines shows them.", style="dim")


def _foot(state: RunState) -> Iterator[Text]:
    if state.num_unreadable:
        number = f"{state.num_unreadable:,}"
        yield Text(f"Could not be read: {number} of the files' lines and states.", style="yellow")


def _worst(ranks: Ranks) -> Sequence[str]:
    """Names, NaN first, then the lowest stable rank."""
    return sorted(
        ranks.by_matrix,
        key=lambda name: (not math.isnan(ranks.by_matrix[name]), ranks.by_matrix[name], name),
    )


def _lowest(ranks: Ranks) -> str:
    names = _worst(ranks)
    if not names:
        return f"step {ranks.step:,}: no stable ranks"
    value = ranks.by_matrix[names[0]]
    return f"step {ranks.step:,}: lowest stable rank {_text(value)}, {visible(names[0])}"


def _steps(logs: Logs, max_steps: int | None) -> str:
    return f"step {logs.step:,}" + (f" of {max_steps:,}" if max_steps else "")


def _numbers(logs: Logs) -> str:
    shown = (
        ("loss", logs.loss),
        ("gradient norm", logs.grad_norm),
        ("its average", logs.baseline),
        ("threshold", logs.threshold),
        ("learning rate", logs.learning_rate),
    )
    return "  ".join(f"{name} {_text(value)}" for name, value in shown if value is not None)


def _sentences(alert: Alert) -> str:
    return f"{visible(alert.happened)} {visible(alert.done)}"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
