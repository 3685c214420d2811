"""The tables of a sweep, for the terminal and as Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hf_pss.evidence.rows import Row
from hf_pss.evidence.statistics import (
    Comparison,
    Setting,
    best_learning_rate,
    compare,
    compare_at_best,
    losses_by_rate,
    settings_of,
    steps_to_loss,
    usable_range,
)
from hf_pss.records.strict_json import visible

__all__ = ["render_markdown", "render_tables"]

_NOTHING = "–"


@dataclass(frozen=True, slots=True)
class _Cells:
    title: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


def render_tables(rows: Sequence[Row], *, reference: str, target: float | None = None) -> Group:
    """Return the tables for a terminal."""
    shown: list[Table | Text] = []
    for cells in _all(rows, reference, target):
        if not cells.body:
            continue
        # `Text`: "[3]" is a number of seeds, which rich would take for markup.
        table = Table(box=None, padding=(0, 2, 0, 0))
        for number, name in enumerate(cells.head):
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
        for line in cells.body:
            table.add_row(*(Text(visible(cell)) for cell in line))
        shown += [Text(cells.title, style="bold"), table, Text()]
    return Group(*shown)


def render_markdown(rows: Sequence[Row], *, reference: str, target: float | None = None) -> str:
    """Return the tables as Markdown."""
    parts = []
    for cells in _all(rows, reference, target):
        if not cells.body:
            continue
        rule = ("---",) + ("---:",) * (len(cells.head) - 1)
        lines = [cells.head, rule, *cells.body]
        parts.append(f"**{cells.title}**\n")
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts.append("")
    return "\n".join(parts)


def _all(rows: Sequence[Row], reference: str, target: float | None) -> list[_Cells]:
    tables = []
    for setting in settings_of(rows):
        here = [row for row in rows if Setting.of(row) == setting]
        guards = list(dict.fromkeys(row.guard for row in here))
        tables.append(_losses(here, setting, guards))
        if reference in guards:
            tables.append(_paired(here, setting, guards, reference))
        tables += [_explosions(here, setting, guards), _cost(here, setting, guards)]
        if target is not None:
            tables.append(_time(here, setting, guards, target))
    return tables


def _losses(rows: Sequence[Row], setting: Setting, guards: Sequence[str]) -> _Cells:
    rates = sorted({row.learning_rate for row in rows})
    body = []
    for guard in guards:
        losses = losses_by_rate(rows, setting, guard)
        best = best_learning_rate(rows, setting, guard)
        cells = [_loss(losses.get(rate), is_best=rate == best) for rate in rates]
        low, high = usable_range(rows, setting, guard)
        body.append((guard, *cells, f"{high / low:.3g}×"))
    head = ("guard", *(f"{rate:g}" for rate in rates), "range")
    return _Cells(
        f"{setting}: median final validation loss by learning rate [seeds]; * the guard's best, "
        "range: rates within 0.05 of it",
        head,
        tuple(body),
    )


def _loss(by_seed: Mapping[int, float] | None, *, is_best: bool) -> str:
    if not by_seed:
        return _NOTHING
    return f"{'*' if is_best else ''}{median(by_seed.values()):.3f} [{len(by_seed)}]"


def _paired(rows: Sequence[Row], setting: Setting, guards: Sequence[str], reference: str) -> _Cells:
    body = []
    for guard in guards:
        if guard == reference:
            continue
        for rate in losses_by_rate(rows, setting, guard):
            found = compare(rows, setting, guard, reference, (rate, rate))
            body += [_comparison(found, f"{rate:g}")] if found else []
        if at_best := compare_at_best(rows, setting, guard, reference):
            ours, theirs = at_best.learning_rates
            body.append(_comparison(at_best, f"own best: {ours:g}, {theirs:g}"))
    return _Cells(
        f"{setting}: paired difference to {reference}, in nats; below zero the guard is better",
        ("guard", "learning rate", "mean", "95 % interval", "better in", "seeds"),
        tuple(body),
    )


def _comparison(found: Comparison, rate: str) -> tuple[str, ...]:
    interval = found.interval
    return (
        found.guard,
        rate,
        f"{found.mean:+.3f}",
        f"{interval[0]:+.3f} … {interval[1]:+.3f}" if interval else _NOTHING,
        str(found.num_wins),
        str(len(found.differences)),
    )


def _explosions(rows: Sequence[Row], setting: Setting, guards: Sequence[str]) -> _Cells:
    rates = sorted({row.learning_rate for row in rows})

    def cell(guard: str, rate: float) -> str:
        here = [row for row in rows if row.guard == guard and row.learning_rate == rate]
        exploded = [row for row in here if row.explosion_kind is not None]
        kinds = sorted({str(row.explosion_kind) for row in exploded})
        told = f" ({', '.join(kinds)})" if kinds else ""
        return f"{len(exploded)} of {len(here)}{told}" if here else _NOTHING

    body = tuple((guard, *(cell(guard, rate) for rate in rates)) for guard in guards)
    head = ("guard", *(f"{rate:g}" for rate in rates))
    return _Cells(f"{setting}: runs that exploded, by learning rate", head, body)


def _cost(rows: Sequence[Row], setting: Setting, guards: Sequence[str]) -> _Cells:
    body = []
    for guard in guards:
        here = [row for row in rows if row.guard == guard and row.train_seconds > 0]
        if here:
            share = median(row.guard_seconds / row.train_seconds for row in here)
            per_step = median(row.train_seconds / max(len(row.losses), 1) for row in here)
            acted = median(len(row.interventions) for row in here)
            cells = (f"{100 * share:.2f} %", f"{1000 * per_step:.1f} ms", f"{acted:g}")
            body.append((guard, *cells, str(len(here))))
    return _Cells(
        f"{setting}: cost by the guard's own clock, medians",
        ("guard", "of training time", "a step", "interventions", "runs"),
        tuple(body),
    )


def _time(rows: Sequence[Row], setting: Setting, guards: Sequence[str], target: float) -> _Cells:
    body = []
    for guard in guards:
        rate = best_learning_rate(rows, setting, guard)
        here = [row for row in rows if row.guard == guard and row.learning_rate == rate]
        steps = [steps_to_loss(row, target) for row in here]
        reached = [step for step in steps if step is not None]
        shown = f"{median(reached):g}" if reached else _NOTHING
        body.append((guard, f"{rate:g}", shown, f"{len(reached)} of {len(here)}"))
    return _Cells(
        f"{setting}: steps to a validation loss of {target:g}, at the guard's best rate",
        ("guard", "learning rate", "median steps", "reached"),
        tuple(body),
    )
