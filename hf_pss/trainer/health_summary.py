"""Build the table for the end of a run: its worst matrices, and the reasons for each."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_pss.health.metrics import METRICS
from hf_pss.health.verdicts import (
    Finding,
    against_noise,
    against_past,
    against_siblings,
    damaged,
    is_ill,
    siblings_of,
    urgency,
    usual,
    usual_of_kinds,
    worst_first,
)
from hf_pss.models.selection.by_name import place_of
from hf_pss.models.tracked import TrackedSpectrum
from hf_pss.records.events import HealthReading
from hf_pss.records.strict_json import visible
from hf_pss.view.numbers import significant

# If one of these metrics is not finite, the weights are damaged.
_OF_WEIGHTS = {"spectral_norm", "stable_rank", "frobenius_norm"}
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    ranks: tuple[float, float]
    norms: tuple[float, float]
    is_stale: bool
    """Whether the last estimates of σ₁ and the stable rank lag behind the matrix."""
    findings: tuple[Finding, ...]
    """The findings and then the remarks, each with the worst first."""


def summary_table(first: HealthReading, last: HealthReading, *, num_lines: int = 10) -> str:
    """Return the table as text, the worst matrices first.

    Args:
        first: The first reading of the run, or the first one after it was resumed.
        last: The last reading. The table shows its matrices.
        num_lines: The largest number of matrices to show.
    """
    rows = sorted(_rows(first, last), key=lambda row: urgency(row.findings, row.ranks[1], row.name))
    if not rows:
        return f"Health at step {last.step}: no matrix was measured."
    ill = sum(is_ill(row.findings) for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("matrix", overflow="fold")
    for title in ("stable rank", "σ₁"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows[:num_lines]:
        why = "; ".join(finding.text for finding in row.findings)
        # `Text` is needed, because rich would interpret square brackets in names as markup.
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
    # Metrics of representations belong to blocks and attention modules, not to matrices.
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
    usual_fall, usual_growth = (
        usual((_ratio(pair) for pair in pairs.values()), default=1.0) for pairs in (ranks, norms)
    )
    usual_norm = usual_of_kinds([norms[name][1] for name in family] for family in families.values())
    rows = []
    for family in families.values():
        siblings = siblings_of(*([pairs[name][1] for name in family] for pairs in (ranks, norms)))
        for name in family:
            rank, norm = ranks[name][1], norms[name][1]
            found = _damage(name, last, norm) or [
                *against_noise(rank, None),
                *against_siblings(rank, norm, siblings, usual_sigma1=usual_norm),
                *against_past(
                    _ratio(ranks[name]),
                    _ratio(norms[name]),
                    usual_fall=usual_fall,
                    usual_growth=usual_growth,
                ),
                *(
                    Finding("metric", f"{metric} is not finite", 0.0)
                    for metric in sorted(_not_finite(name, last))
                ),
            ]
            stale = _is_stale(name, last)
            rows.append(_Row(name, ranks[name], norms[name], stale, worst_first(found)))
    return rows


def _is_stale(name: str, last: HealthReading) -> bool:
    # Exact numbers have no residual, and neither have matrices that are not finite.
    residual = last.matrices.get("spectral_norm_residual", {}).get(name, math.nan)
    return not math.isnan(residual) and TrackedSpectrum(math.nan, math.nan, residual).is_stale


def _is_of_representations(metric: str) -> bool:
    row = METRICS.get(metric.removesuffix("_lower").removesuffix("_upper"))
    return row is not None and row.level == "representations"


def _damage(name: str, last: HealthReading, norm: float) -> list[Finding]:
    if norm == 0:  # the stable rank of such a matrix is NaN
        return [damaged("zero")]
    broken = _not_finite(name, last) & _OF_WEIGHTS
    if broken == {"stable_rank"} and math.isnan(norm):  # products of adapters have no norm here
        return [damaged("non_finite", "no stable rank: zeros, NaN or inf")]
    return [damaged("non_finite", f"not finite: {', '.join(sorted(broken))}")] if broken else []


def _not_finite(name: str, last: HealthReading) -> set[str]:
    return {
        metric
        for metric, by_name in last.matrices.items()
        if name in by_name and not math.isfinite(by_name[name])
    }


def _ratio(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0] if pair[0] > 0 else math.nan


def _pair(first: HealthReading, last: HealthReading, metric: str, name: str) -> tuple[float, float]:
    before, after = (r.matrices.get(metric, {}).get(name, math.nan) for r in (first, last))
    return before, after


def _arrow(pair: tuple[float, float], is_stale: bool) -> str:
    before, after = map(_text, pair)
    after = f"~{after}" if is_stale else after
    return after if math.isnan(pair[0]) else f"{before} → {after}"


def _text(value: float) -> str:
    return significant(value) if math.isfinite(value) else str(value)
