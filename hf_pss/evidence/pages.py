"""Render a document from a template and the rows beside it, which give it every number."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.architectures import FAMILIES
from hf_pss.evidence.recipes import RECIPES
from hf_pss.evidence.rows import (
    USABLE_WITHIN_NATS,
    PairedDifferences,
    Row,
    best_learning_rate,
    by_setting,
    comparable,
    compare_at_best,
    final_loss,
    is_at_edge,
    losses_by_rate,
    read_rows,
    usable_range,
)
from hf_pss.evidence.sweep_plots import plot_gains, plot_learning_rates, plot_progress
from hf_pss.evidence.sweep_table import Cells, markdown_table
from hf_pss.runs.folder import write_whole
from hf_pss.view.canvas import Figure, style, to_png
from hf_pss.view.numbers import NOTHING, percent

TEMPLATE_SUFFIX = ".j2"
ROWS_FOLDER = "rows"
REMEDIES = (
    *("matrix_lr_ratio", "warmup_steps", "adam_beta1", "adam_beta2"),
    *("weight_decay", "max_grad_norm"),
)
"""Changes of a recipe that stand for a guard: a page compares them with guards.

All other changes of a recipe describe the situation in which guards are compared.
"""
FAILED_BELOW = 0.5
"""A run has failed if it descends below the unigram entropy by less than this share of the largest
descent in its situation. The number is ours."""
_UNSEEN = ("num_steps", "eval_every_steps")
"""Changes that a situation's name leaves out: its length is named apart."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs that a template asks about.

    The name of a guard includes an optimizer other than AdamW, and the recipe's `REMEDIES` unless
    all runs of its situation have them. A
    method that is about one guard raises ConfigurationError if the runs are not of one situation,
    or if none of them has this guard.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Runs:
        """Return the comparable runs among rows."""
        return cls(tuple(_named_in_full(comparable(rows))))

    def __bool__(self) -> bool:
        return bool(self.rows)

    def where(self, **wanted: Any) -> Runs:
        """Return the runs in which these fields of a row, or changes of a recipe, have a value."""
        kept = (row for row in self.rows if all(_get(row, k) == v for k, v in wanted.items()))
        return Runs(tuple(kept))

    def only(self, *guards: str) -> Runs:
        """Return the runs of these guards."""
        return Runs(tuple(row for row in self.rows if row.guard in guards))

    def situations(self) -> list[Runs]:
        """Return the runs of each situation: ordered by recipe and changes, then by length."""
        found = [Runs(tuple(rows)) for rows in by_setting(self.rows).values()]
        return sorted(found, key=lambda runs: (_name(runs.rows[0]), runs.rows[0].num_steps))

    @property
    def title(self) -> str:
        """The situation of these runs, which must be one: recipe, changes and length."""
        if len(by_setting(self.rows)) != 1:
            raise ConfigurationError(
                f"The template asks about one situation among {len(self.situations())}: narrow the "
                "runs with where(), or loop over situations()."
            )
        return f"{_name(self.rows[0])}, {self.rows[0].num_steps:,} steps"

    def guards(self, reference: str) -> list[str]:
        """Return the guards of one situation: the reference, then by ascending loss."""
        losses = {guard: self._median(guard) for guard in {row.guard for row in self.rows}}
        return sorted(losses, key=lambda guard: (guard != reference, losses[guard], guard))

    def best(self) -> str:
        """Return the guard with the lowest median loss in one situation."""
        return self.guards("")[0]

    def ties(self, guard: str) -> list[str]:
        """Return the other guards whose difference to this one has an interval with zero.

        Too few seeds give no interval.
        """
        differences = {g: self._difference(g, guard) for g in self.guards("") if g != guard}
        return [g for g, found in differences.items() if found is not None and _holds_zero(found)]

    def seeds(self, guard: str) -> int:
        """Return the number of seeds at the best rate of the guard."""
        return len(self._by_seed(guard))

    def loss(self, guard: str) -> str:
        """Return the median final loss at the best rate of the guard."""
        return f"{self._median(guard):.3f}"

    def rate(self, guard: str) -> str:
        """Return the best rate, with a note if it is the only one or at the edge of those tried."""
        best = f"{best_learning_rate(self._with(guard), guard):g}"
        if len(losses_by_rate(self.rows, guard)) == 1:
            return f"{best} (only)"
        return f"{best} (edge)" if is_at_edge(self.rows, guard) else best

    def usable(self, guard: str) -> str:
        """Return the range of rates that are nearly as good as the best."""
        low, high = usable_range(self._with(guard), guard)
        return f"{low:g}" if low == high else f"{low:g} to {high:g} ({high / low:.3g}×)"

    def gain(self, guard: str, reference: str) -> str:
        """Return the mean paired difference, each at its best rate, with interval and wins."""
        found = self._difference(guard, reference)
        if found is None:
            return NOTHING
        interval = f" ({' … '.join(map(_signed, found.interval))})" if found.interval else ""
        wins = f"{found.num_wins} of {len(found.differences)}"
        return f"{_signed(found.mean)}{interval}, {wins}"

    def verdict(self, guard: str, reference: str) -> str:
        """Return a clause about the difference, as far as its interval allows one."""
        found = self._difference(guard, reference)
        if found is None or found.interval is None:
            return f"`{guard}` has too few seeds for a comparison with `{reference}`"
        if _holds_zero(found):
            return f"`{guard}` cannot be distinguished from `{reference}`"
        side = "below" if found.mean < 0 else "above"
        return f"`{guard}` ends {abs(found.mean):.3f} {side} `{reference}`"

    def rates(self) -> list[float]:
        """Return all learning rates that were tried, in ascending order."""
        return sorted({row.learning_rate for row in self.rows})

    def exploded(self, guard: str) -> str:
        """Return how many runs of a guard exploded, over all rates."""
        found = self._explosions(guard)
        return f"{sum(found)} of {len(found)}"

    def failed(self, guard: str, rate: float) -> str:
        """Return how many runs of a guard failed at a rate: they exploded or learned too little.

        `FAILED_BELOW` says what is too little in one situation.
        """
        found = self._failures(guard, rate)
        return f"{sum(found)} of {len(found)}"

    def share_failed(self, guard: str, rate: float) -> float:
        """Return the share of these runs, from 0 to 1."""
        found = self._failures(guard, rate)
        return sum(found) / len(found)

    def cost(self, guard: str) -> str:
        """Return the median share of the training time that the guard took."""
        here = [row for row in self._with(guard) if row.guard == guard and row.train_seconds > 0]
        return percent(median(row.guard_seconds / row.train_seconds for row in here))

    def contest(self, reference: str) -> str:
        """Return the table of every guard at its best rate, in every situation."""
        lead: tuple[str, ...] = ("situation", "guard", "best rate", "median loss [seeds]")
        cells: Cells = [(*lead, f"difference to `{reference}`", "usable rates", "exploded")]
        for runs in self.situations():
            for guard in runs.guards(reference):
                is_other = guard != reference and reference in {row.guard for row in runs.rows}
                loss = f"{runs.loss(guard)} [{runs.seeds(guard)}]"
                gain = runs.gain(guard, reference) if is_other else NOTHING
                lead = (runs.title, f"`{guard}`", runs.rate(guard), loss)
                cells.append((*lead, gain, runs.usable(guard), runs.exploded(guard)))
        return markdown_table(_once(cells))

    def failures(self, reference: str) -> str:
        """Return the table of the rates at which a run failed, and the loss of the others."""
        head = ("situation", "rate", "guard", "failed", "exploded", "median loss")
        cells: Cells = [(*head, "loss of those that did not fail")]
        for situation in self.situations():
            for rate in situation.rates():
                runs = situation.where(learning_rate=rate)
                guards = runs.guards(reference)
                if not any(situation.share_failed(guard, rate) for guard in guards):
                    continue
                for guard in guards:
                    pairs = zip(
                        runs.only(guard).rows, situation._failures(guard, rate), strict=True
                    )
                    sound = [final_loss(row) for row, has_failed in pairs if not has_failed]
                    lead = (runs.title, f"{rate:g}", f"`{guard}`", situation.failed(guard, rate))
                    others = f"{median(sound):.3f}" if sound else NOTHING
                    cells.append((*lead, runs.exploded(guard), runs.loss(guard), others))
        return markdown_table(_once(cells))

    def costs(self) -> str:
        """Return the table of each guard's share of the training time, by its own clock."""
        cells: Cells = [("situation", "guard", "of the training time", "times acted", "runs")]
        for runs in self.situations():
            for guard in sorted({row.guard for row in runs.rows if row.train_seconds > 0}):
                here = [row for row in runs.rows if row.guard == guard]
                acted = f"{median(row.times_acted for row in here):g}"
                cells.append((runs.title, f"`{guard}`", runs.cost(guard), acted, str(len(here))))
        return markdown_table(_once(cells))

    def _with(self, *guards: str) -> tuple[Row, ...]:
        """Return the rows if they are of one situation and each of these guards has some."""
        situation, known = self.title, {row.guard for row in self.rows}
        if missing := [guard for guard in guards if guard not in known]:
            raise ConfigurationError(
                f"The template asks about {missing[0]!r} in {situation}; the guards there are "
                f"{', '.join(sorted(known))}."
            )
        return self.rows

    def _explosions(self, guard: str) -> list[bool]:
        return [row.explosion_kind is not None for row in self._with(guard) if row.guard == guard]

    def _failures(self, guard: str, rate: float) -> list[bool]:
        least = FAILED_BELOW * max(map(_descent, self._with(guard)))
        own = self.only(guard).where(learning_rate=rate).rows
        if not own:
            raise ConfigurationError(f"{guard!r} has no run at a rate of {rate:g} in {self.title}.")
        return [row.explosion_kind is not None or _descent(row) <= least for row in own]

    def _by_seed(self, guard: str) -> Mapping[int, float]:
        losses = losses_by_rate(self._with(guard), guard)
        return losses[best_learning_rate(self.rows, guard)]

    def _median(self, guard: str) -> float:
        return median(self._by_seed(guard).values())

    def _difference(self, guard: str, reference: str) -> PairedDifferences | None:
        return compare_at_best(self._with(guard, reference), guard, reference)


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of a page."""

    plot: Callable[[], Figure]
    digest: str
    """A hash of the rows that it shows. The PNG file holds it as its description."""


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered template."""

    text: str
    pictures: Mapping[str, Picture]
    """By the name of the PNG file."""


def render_page(template: Path) -> Page:
    """Render a Markdown template with the rows of the folder ``rows`` beside it.

    In the template, ``rows("horizon", "sizes")`` is the `Runs` of the files ``horizon.jsonl`` and
    ``sizes.jsonl``, as far as they exist. ``picture(kind, runs, reference)`` is a figure:
    ``learning-rates`` or ``progress`` of one situation, or ``gains`` of several.

    Raises:
        ConfigurationError: The template has an error or leaves a file of rows out, or a file does
            not hold rows.
    """
    paths = sorted((template.parent / ROWS_FOLDER).glob("*.jsonl"))
    found = {path.stem: list(read_rows(path)) for path in paths}
    unread = set(found)
    pictures: dict[str, Picture] = {}

    def rows(*names: str) -> Runs:
        unread.difference_update(names)
        return Runs.of(row for name in names for row in found.get(name, ()))

    def picture(kind: str, runs: Runs, reference: str, name: str = "") -> str:
        shown = runs.rows
        plots: dict[str, Callable[[], Figure]] = {
            "gains": lambda: plot_gains({r.title: r.rows for r in runs.situations()}, reference),
            "learning-rates": lambda: plot_learning_rates(shown, runs.title, reference),
            "progress": lambda: plot_progress(shown, runs.title, reference),
        }
        name = name or runs.title
        file = f"{kind}-{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}.png"
        lines = "".join(sorted(row.to_line() for row in shown))
        digest = hashlib.sha256(f"{reference}\n{lines}".encode()).hexdigest()
        pictures[file] = Picture(plots[kind], digest)
        return f"![{kind.replace('-', ' ')}: {name}]({file})"

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    known = {"rows": rows, "picture": picture, "usable_within": f"{USABLE_WITHIN_NATS:g}"}
    known["failed_below"] = f"{FAILED_BELOW:g}"
    try:
        text = environment.get_template(template.name).render(known)
    except TemplateError as error:
        raise ConfigurationError(f"The template {template} has an error: {error}") from error
    if unread:
        raise ConfigurationError(f"{template} shows no rows of {', '.join(sorted(unread))}.")
    return Page(text, pictures)


def write_page(template: Path) -> list[Path]:
    """Write the page and its figures beside its template, and return their paths.

    Raises:
        ConfigurationError: See `render_page`; or the template's name does not end in ``.j2``.
        OSError: A file cannot be written.
    """
    if template.suffix != TEMPLATE_SUFFIX:
        raise ConfigurationError(
            f"{template} is no template: its name must be that of the page with {TEMPLATE_SUFFIX}, "
            "such as README.md.j2."
        )
    page = render_page(template)
    files = []
    for name, picture in page.pictures.items():
        with style():
            files.append(template.parent / name)
            write_whole(files[-1], to_png(picture.plot(), description=picture.digest))
    files.append(template.with_suffix(""))
    write_whole(files[-1], page.text)
    return files


def _named_in_full(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows with optimizer and remedies in the guard's name, and the length as a change.

    A remedy that all runs of a situation have remains one of the situation's changes.
    """
    rows = list(rows)
    values = defaultdict(set)
    for row in rows:
        for name in REMEDIES:
            values[_situation(row), name].add(row.changes.get(name))
    for row in rows:
        own = [name for name in REMEDIES if len(values[_situation(row), name]) > 1]
        remedies = [f"{name} {row.changes[name]}" for name in own if name in row.changes]
        optimizer = [] if row.optimizer == "adamw" else [row.optimizer]
        rest = {k: v for k, v in row.changes.items() if k not in (*own, *_UNSEEN)}
        yield replace(
            row,
            guard=" · ".join((row.guard, *optimizer, *remedies)),
            optimizer="",
            changes={**rest, "num_steps": row.num_steps},
        )


def _situation(row: Row) -> tuple[Any, ...]:
    """Return what no guard and no remedy changes."""
    rest = {k: v for k, v in row.changes.items() if k not in (*REMEDIES, *_UNSEEN)}
    return row.recipe, row.num_steps, *sorted(rest.items())


def _descent(row: Row) -> float:
    """Return by how much the validation loss ends below the unigram entropy, in nats."""
    return row.unigram_entropy - final_loss(row)


def _holds_zero(found: PairedDifferences) -> bool:
    return found.interval is not None and found.interval[0] <= 0 <= found.interval[1]


def _once(cells: Cells) -> Cells:
    """Return the cells with each situation in the first of its lines only."""
    pairs = zip([("",), *cells], cells, strict=False)
    return [("" if last[0] == line[0] else line[0], *line[1:]) for last, line in pairs]


def _name(row: Row) -> str:
    changes = sorted((k, v) for k, v in row.changes.items() if k != "num_steps")
    recipe = RECIPES.get(row.recipe)
    title = row.recipe if recipe is None else f"{FAMILIES[recipe.architecture]} ({row.recipe})"
    return " · ".join((title, *(f"{name} {value}" for name, value in changes)))


def _get(row: Row, name: str) -> Any:
    return row.changes[name] if name in row.changes else getattr(row, name, None)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
