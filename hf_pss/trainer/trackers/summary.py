"""The end of a run in one table: every matrix that looks ill, the worst first, and why."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_pss.health.metrics import METRICS
from hf_pss.health.tracked import TrackedSpectrum
from hf_pss.inspection.verdicts import LARGE_RATIO_TO_SIBLINGS, LOW_SHARE_OF_SIBLINGS, MIN_SIBLINGS
from hf_pss.models.selection.places import place_of
from hf_pss.records.steps import HealthReading
from hf_pss.records.strict_json import visible
from hf_pss.view.numbers import significant

__all__ = ["summary_table"]

# Ours, as the limits of a checkpoint's inspection: they say what to look at first.
_FALL_SHARE = 0.5
_GROWTH_RATIO = 4.0
# Below 2, σ₁² is more than half of ‖W‖².
_ONE_DIRECTION = 2.0
_SMALLEST = 1e-300
# Where these are not finite, the weights are not.
_OF_WEIGHTS = {"spectral_norm", "stable_rank", "frobenius_norm"}
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    ranks: tuple[float, float]
    norms: tuple[float, float]
    is_stale: bool
    """The last estimate of σ₁ lags behind the matrix, and so does the stable rank."""
    reasons: tuple[tuple[float, str], ...]
    """(how far beyond its limit, as a natural logarithm; why)."""

    @property
    def order(self) -> tuple[float, float, str]:
        worst = max((excess for excess, _ in self.reasons), default=-math.inf)
        rank = self.ranks[1]
        return (-worst, math.inf if math.isnan(rank) else rank, self.name)


def summary_table(first: HealthReading, last: HealthReading, *, num_lines: int = 10) -> str:
    """Return the table as text, the worst matrices first.

    Args:
        first: The run's first reading, or the one it resumed with.
        last: Its last; the matrices are of this one.
        num_lines: The most matrices to show.
    """
    rows = sorted(_rows(first, last), key=lambda row: row.order)
    if not rows:
        return f"Health at step {last.step}: no matrix was measured."
    ill = sum(bool(row.reasons) for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("matrix", overflow="fold")
    for title in ("stable rank", "σ₁"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows[:num_lines]:
        why = "; ".join(text for _, text in sorted(row.reasons, reverse=True))
        # `Text`: names hold square brackets, which rich takes for markup.
        table.add_row(
            Text(visible(row.name).replace(".weight", "")),
            _arrow(row.ranks, row.is_stale),
            _arrow(row.norms, row.is_stale),
            Text(why),
        )
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None)
    console.print(table)
    hidden = len(rows) - num_lines
    more = f"\n{hidden:,} more are not shown." if hidden > 0 else ""
    if num_stale := sum(row.is_stale for row in rows):
        more += f"\n~ stale, {num_stale:,} in all: the matrix moves faster than the estimate of σ₁."
    lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return (
        f"Health from step {first.step} to step {last.step}, the worst of {len(rows)} matrices "
        f"first; {ill} to look at:\n{lines}{more}"
    )


def _rows(first: HealthReading, last: HealthReading) -> list[_Row]:
    # Numbers of blocks and attentions are no matrices'.
    held = [found for metric, found in last.matrices.items() if not _is_of_representations(metric)]
    names = list(dict.fromkeys(name for found in held for name in found))
    families: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        place = place_of(name)
        families[place.stack, place.kind].append(name)
    ranks, norms = (
        {name: _pair(first, last, metric, name) for name in names}
        for metric in ("stable_rank", "spectral_norm")
    )
    # Training lowers stable ranks and raises norms by itself: news is what goes another way.
    usual_change = tuple(
        _median([_ratio(pair) for pair in pairs.values()], default=1.0) for pairs in (ranks, norms)
    )
    rows = []
    for family in families.values():
        usual = tuple(_median([pairs[name][1] for name in family]) for pairs in (ranks, norms))
        for name in family:
            reasons = _damage(name, last, norms[name][1]) or [
                *_against_others(ranks[name], norms[name], usual_change, usual),
                *((0.0, f"{metric} is not finite") for metric in sorted(_not_finite(name, last))),
            ]
            stale = _is_stale(name, last)
            rows.append(_Row(name, ranks[name], norms[name], stale, tuple(reasons)))
    return rows


def _is_stale(name: str, last: HealthReading) -> bool:
    # Exact numbers have no residual, nor have matrices that are broken: the table says so.
    residual = last.matrices.get("spectral_norm_residual", {}).get(name, math.nan)
    return not math.isnan(residual) and TrackedSpectrum(math.nan, math.nan, residual).is_stale


def _is_of_representations(metric: str) -> bool:
    row = METRICS.get(metric.removesuffix("_lower").removesuffix("_upper"))
    return row is not None and row.level == "representations"


def _damage(name: str, last: HealthReading, norm: float) -> list[tuple[float, str]]:
    if norm == 0:  # its stable rank is NaN, and no news
        return [(math.inf, "every number is 0")]
    broken = _not_finite(name, last) & _OF_WEIGHTS
    if broken == {"stable_rank"} and math.isnan(norm):  # a product of adapters has no norm here
        return [(math.inf, "no stable rank: zeros, NaN or inf")]
    return [(math.inf, f"not finite: {', '.join(sorted(broken))}")] if broken else []


def _not_finite(name: str, last: HealthReading) -> set[str]:
    return {
        metric
        for metric, by_name in last.matrices.items()
        if name in by_name and not math.isfinite(by_name[name])
    }


def _against_others(
    ranks: tuple[float, float],
    norms: tuple[float, float],
    usual_change: tuple[float, ...],
    usual: tuple[float, ...],
) -> Iterator[tuple[float, str]]:
    """Yield what is beyond a limit: comparisons with NaN, for what is not known, are false."""
    fall, growth = _ratio(ranks), _ratio(norms)
    for excess, why in (
        (_ONE_DIRECTION / _positive(ranks[1]), "one direction holds more than half of ‖W‖²"),
        (
            _FALL_SHARE * usual_change[0] / _positive(fall),
            f"stable rank fell to {fall:.0%}, others to {usual_change[0]:.0%}",
        ),
        (
            LOW_SHARE_OF_SIBLINGS * usual[0] / _positive(ranks[1]),
            f"its siblings' median stable rank is {significant(usual[0])}",
        ),
        (
            growth / (_GROWTH_RATIO * usual_change[1]),
            f"σ₁ grew {significant(growth)} ×, others {significant(usual_change[1])} ×",
        ),
        (
            norms[1] / _positive(LARGE_RATIO_TO_SIBLINGS * usual[1]),
            f"its siblings' median σ₁ is {significant(usual[1])}",
        ),
    ):
        if excess > 1:
            yield math.log(excess), why


def _ratio(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0] if pair[0] > 0 else math.nan


def _pair(first: HealthReading, last: HealthReading, metric: str, name: str) -> tuple[float, float]:
    before, after = (r.matrices.get(metric, {}).get(name, math.nan) for r in (first, last))
    return before, after


def _median(values: list[float], *, default: float = math.nan) -> float:
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return statistics.median(finite) if len(finite) >= MIN_SIBLINGS else default


def _positive(value: float) -> float:
    return max(value, _SMALLEST)  # NaN stays NaN: max returns its first argument


def _arrow(pair: tuple[float, float], is_stale: bool) -> str:
    before, after = map(_text, pair)
    after = f"~{after}" if is_stale else after
    return after if math.isnan(pair[0]) else f"{before} → {after}"


def _text(value: float) -> str:
    return significant(value) if math.isfinite(value) else str(value)
