"""The tables of a sweep, with the same cells for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from rich.console import Group, RenderableType
from rich.text import Text

from hf_pss.evidence.rows import (
    PairedDifferences,
    Row,
    best_learning_rate,
    by_setting,
    compare_at,
    compare_at_best,
    is_at_edge,
    losses_by_rate,
    steps_to_loss,
    usable_range,
)
from hf_pss.view.numbers import NOTHING
from hf_pss.view.tables import lean_table

Cells = list[tuple[str, ...]]
"""The header of a table, then its lines."""


def render_tables(rows: Sequence[Row], *, reference: str, target: float | None = None) -> Group:
    """Return the tables for a terminal."""
    shown: list[RenderableType] = []
    for title, (head, *body) in _tables(rows, reference, target):
        table = lean_table(head[:1], head[1:], rows=body)
        shown += [Text(title, style="bold"), table, Text()]
    return Group(*shown)


def render_markdown(rows: Sequence[Row], *, reference: str, target: float | None = None) -> str:
    """Return the tables as Markdown."""
    tables = _tables(rows, reference, target)
    return "\n".join(f"**{title}**\n\n{markdown_table(cells)}\n" for title, cells in tables)


def markdown_table(cells: Cells) -> str:
    """Return a table in Markdown, with all columns but the first aligned to the right."""
    head, *body = cells
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def edge_warnings(rows: Sequence[Row]) -> list[str]:
    """Return a warning for each guard whose best rate of several is the lowest or the highest."""
    return [
        f"{setting}: the best rate of {guard}, {best_learning_rate(here, guard):g}, is at the edge "
        "of its grid. Add rates beyond it."
        for setting, here in by_setting(rows).items()
        for guard in dict.fromkeys(row.guard for row in here)
        if len(losses_by_rate(here, guard)) > 1 and is_at_edge(here, guard)
    ]


def _tables(
    rows: Sequence[Row], reference: str, target: float | None
) -> Iterator[tuple[str, Cells]]:
    """Yield the titles and cells of every table that has a line."""
    for setting, here in by_setting(rows).items():
        guards = list(dict.fromkeys(row.guard for row in here))
        found = {
            "median final validation loss by learning rate [seeds]; * the guard's best, range: "
            "rates within 0.05 of it": _losses(here, guards),
            f"paired difference to {reference}, in nats; below zero the guard is better": (
                _paired(here, guards, reference) if reference in guards else []
            ),
            "runs that exploded, by learning rate": _explosions(here, guards),
            "cost by the guard's clock, medians": _cost(here, guards),
        }
        if target is not None:
            title = f"steps to a validation loss of {target:g}, at the guard's best rate"
            found[title] = _steps(here, guards, target)
        for title, cells in found.items():
            if len(cells) > 1:
                yield f"{setting}: {title}", cells


def _losses(rows: Sequence[Row], guards: Sequence[str]) -> Cells:
    rates = sorted({row.learning_rate for row in rows})
    cells: Cells = [("guard", *(f"{rate:g}" for rate in rates), "range")]
    for guard in guards:
        losses = losses_by_rate(rows, guard)
        best = best_learning_rate(rows, guard)
        shown = (_loss(losses.get(rate), is_best=rate == best) for rate in rates)
        low, high = usable_range(rows, guard)
        cells.append((guard, *shown, f"{high / low:.3g}×"))
    return cells


def _loss(by_seed: Mapping[int, float] | None, *, is_best: bool) -> str:
    if not by_seed:
        return NOTHING
    return f"{'*' if is_best else ''}{median(by_seed.values()):.3f} [{len(by_seed)}]"


def _paired(rows: Sequence[Row], guards: Sequence[str], reference: str) -> Cells:
    cells: Cells = [("guard", "learning rate", "mean", "95 % interval", "better in", "seeds")]
    for guard in guards:
        if guard == reference:
            continue
        for rate in losses_by_rate(rows, guard):
            if found := compare_at(rows, guard, reference, (rate, rate)):
                cells.append(_difference(found, f"{rate:g}"))
        if at_best := compare_at_best(rows, guard, reference):
            ours, theirs = at_best.learning_rates
            cells.append(_difference(at_best, f"own best: {ours:g}, {theirs:g}"))
    return cells


def _difference(found: PairedDifferences, rate: str) -> tuple[str, ...]:
    interval = found.interval
    return (
        found.guard,
        rate,
        f"{found.mean:+.3f}",
        f"{interval[0]:+.3f} … {interval[1]:+.3f}" if interval else NOTHING,
        str(found.num_wins),
        str(len(found.differences)),
    )


def _explosions(rows: Sequence[Row], guards: Sequence[str]) -> Cells:
    rates = sorted({row.learning_rate for row in rows})

    def cell(guard: str, rate: float) -> str:
        here = [row for row in rows if row.guard == guard and row.learning_rate == rate]
        exploded = [row.explosion_kind for row in here if row.explosion_kind is not None]
        kinds = f" ({', '.join(sorted(set(exploded)))})" if exploded else ""
        return f"{len(exploded)} of {len(here)}{kinds}" if here else NOTHING

    head = ("guard", *(f"{rate:g}" for rate in rates))
    return [head, *((guard, *(cell(guard, rate) for rate in rates)) for guard in guards)]


def _cost(rows: Sequence[Row], guards: Sequence[str]) -> Cells:
    cells: Cells = [("guard", "of training time", "per step", "interventions", "runs")]
    for guard in guards:
        # A run that was stopped has trained for fewer steps than its recipe sets.
        finished = [row for row in rows if row.guard == guard and row.status == "finished"]
        if here := [row for row in finished if row.train_seconds > 0]:
            share = median(row.guard_seconds / row.train_seconds for row in here)
            per_step = median(row.train_seconds / row.num_steps for row in here)
            acted = median(row.times_acted for row in here)
            numbers = (f"{100 * share:.2f} %", f"{1000 * per_step:.1f} ms", f"{acted:g}")
            cells.append((guard, *numbers, str(len(here))))
    return cells


def _steps(rows: Sequence[Row], guards: Sequence[str], target: float) -> Cells:
    cells: Cells = [("guard", "learning rate", "median steps", "reached")]
    for guard in guards:
        rate = best_learning_rate(rows, guard)
        here = [row for row in rows if row.guard == guard and row.learning_rate == rate]
        reached = [step for row in here if (step := steps_to_loss(row, target)) is not None]
        shown = f"{median(reached):g}" if reached else NOTHING
        cells.append((guard, f"{rate:g}", shown, f"{len(reached)} of {len(here)}"))
    return cells
