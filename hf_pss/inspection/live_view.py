"""Show the state of a live run, as a screen that is redrawn or as plain lines of news."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from hf_pss.records.events import HealthReading
from hf_pss.records.messages import Alert, AlertLevel, alert_of, overall_advice
from hf_pss.records.strict_json import printable, visible
from hf_pss.runs.follow import RunState
from hf_pss.view.numbers import duration, plural
from hf_pss.view.tables import lean_table

_STYLES = {AlertLevel.INFO: "", AlertLevel.WARN: "yellow", AlertLevel.ERROR: "bold red"}
_STALE_SECONDS = 600.0


def render(state: RunState, *, now: float, num_events: int, num_matrices: int) -> RenderableType:
    """Return the screen.

    Args:
        state: The state at the last poll.
        now: The present time, as `time.time`.
        num_events: Largest number of events to show; the newest comes last.
        num_matrices: Largest number of matrices to show; the lowest stable rank comes first.
    """
    if state.is_empty:
        return Text(f"{visible(state.folder)}: nothing has been written yet.", style="dim")
    return Group(
        _head(state, now),
        _log_line(state),
        *_event_lines(state, num_events),
        *_rank_lines(state, num_matrices),
        *_foot(state),
    )


def plain_lines(before: RunState | None, state: RunState) -> Iterator[str]:
    """Yield the news since the previous state: logs, events with their advice, readings."""
    if state.has_resumed:
        yield "The run has resumed from a checkpoint: later events are superseded."
    if state.log is not None and (before is None or before.log != state.log):
        yield ": ".join(_log(state))
    for record in state.fresh_events:
        alert = alert_of(record)
        yield f"{alert.level.name}: {_sentences(alert)} {visible(alert.advice)}"
    if state.reading is not None and (before is None or before.reading != state.reading):
        step, ranks = f"step {state.reading.step:,}", _ranks(state.reading)
        names = _worst(ranks)
        lowest = names and f"lowest stable rank {ranks[names[0]]:.4g}, {visible(names[0])}"
        yield f"{step}: {lowest or 'no stable ranks'}"


def _head(state: RunState, now: float) -> Text:
    age = max(0.0, now - (state.modified_seconds or now))
    text = Text(visible(state.folder), style="bold")
    if state.has_ended:
        return text.append("  the run has ended", style="green")
    style = "yellow" if age > _STALE_SECONDS else "dim"
    return text.append(f"  last write {duration(float(round(age)))} ago", style=style)


def _log_line(state: RunState) -> Text:
    if state.log is None:
        return Text("No training log yet: trainer_state.json comes with a checkpoint.", style="dim")
    numbers = (state.log.loss, state.log.grad_norm)
    is_broken = any(v is not None and not math.isfinite(v) for v in numbers)
    line = Text("  ".join(_log(state)), style="bold red" if is_broken else "")
    return line.append(f"  ({visible(state.log_source)})", style="dim")


def _log(state: RunState) -> tuple[str, str]:
    """Return the step and the numbers of the newest row."""
    if state.log is None:
        return "", ""
    shown = (
        ("loss", state.log.loss),
        ("gradient norm", state.log.grad_norm),
        ("its average", state.log.baseline),
        ("threshold", state.log.threshold),
        ("learning rate", state.log.learning_rate),
    )
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown if value is not None)
    end = f" of {state.max_steps:,}" if state.max_steps else ""
    return f"step {state.log.step:,}{end}", numbers


def _event_lines(state: RunState, num_events: int) -> Iterator[Text]:
    if not state.num_events:
        yield Text("No event.", style="dim")
        return
    num_shown = min(num_events, len(state.events))
    more = f", the newest {num_shown}" if state.num_events > num_shown else ""
    counts = plural(state.num_events, "event"), plural(state.num_interventions, "intervention")
    yield Text(f"{', '.join(counts)}{more}:")
    for alert in map(alert_of, state.events[-num_events:]):
        yield Text(f"  {_sentences(alert)}", style=_STYLES[alert.level])
    if state.events:
        # All events that are kept count, because the floor may act at every check, and the few
        # newest events may then be routine after any number of spikes.
        advice = overall_advice(state.events, shlex.quote(visible(state.folder)))
        yield Text(f"  {printable(advice)}", style="italic")


def _rank_lines(state: RunState, num_matrices: int) -> Iterator[RenderableType]:
    ranks = _ranks(state.reading)
    if state.reading is None or not ranks:
        why = (
            "none could be read"
            if state.num_unreadable
            else "train with pss_health=light to have them"
        )
        yield Text(f"No stable ranks: {why}.", style="dim")
        return
    first, firsts = state.first_reading, _ranks(state.first_reading)
    has_past = first is not None and first.step < state.reading.step
    past_title = [f"step {first.step:,}"] if first is not None and has_past else []
    title = f"lowest stable ranks, step {state.reading.step:,}"
    table = lean_table([title], ["now", *past_title])
    names = _worst(ranks)
    for name in names[:num_matrices]:
        value = ranks[name]
        shown = Text(visible(name).replace(".weight", ""))
        now = Text(f"{value:.4g}", style="bold red" if math.isnan(value) else "")
        past = f"{firsts[name]:.4g}" if name in firsts else "–"
        table.add_row(shown, now, *([past] if has_past else []))
    yield table
    hidden = len(names) - num_matrices
    if hidden > 0:
        yield Text(f"{hidden:,} more; --lines shows them.", style="dim")


def _foot(state: RunState) -> Iterator[Text]:
    if state.num_unreadable:
        number = plural(state.num_unreadable, "line or state", "lines or states")
        yield Text(f"{number} of the files could not be read.", style="yellow")


def _ranks(reading: HealthReading | None) -> Mapping[str, float]:
    return {} if reading is None else reading.matrices.get("stable_rank", {})


def _worst(ranks: Mapping[str, float]) -> Sequence[str]:
    """Return the names, those with NaN first, then by ascending stable rank."""
    return sorted(ranks, key=lambda name: (not math.isnan(ranks[name]), ranks[name], name))


def _sentences(alert: Alert) -> str:
    return f"{visible(alert.happened)} {visible(alert.done)}"
