"""Find when a live metric leaves the range of healthy twins, and whether the loss follows.

One rule serves all metrics [ours]. A metric has one series, a number for the whole model, or
several: its smallest, median and largest value over matrices. The twins' range at step t spans all
of their readings within `NEAR_STEPS` of t. A reading at step t is outside if one of its series is
farther from the range than a widening times the width of the range. The range is logarithmic if all
its readings are above zero. So the rule treats a metric that moves by powers of ten like one that
moves by hundredths. A missing number is outside if the twins have one. A metric that a run has not
recorded at all is not judged.

Twins are the runs at the lowest learning rate that did not explode, with the same recipe,
optimizer, changes and guard. The twins of a recipe with a fault are the runs of `undamaged` at the
same rate. Each twin is judged against the other twins.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from hf_pss.evidence.early_warnings import (
    LeadScore,
    departure_step,
    lead_time,
    most_sensitive,
    record_of,
)
from hf_pss.evidence.rows import Row, Setting
from hf_pss.view.numbers import NOTHING
from hf_pss.view.tables import lean_table

NEAR_STEPS = 25
"""A reading is compared with the twins' readings at most this many steps away, so that a run that
is only ahead of its twins is not outside."""
WIDENINGS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""The widenings to try, the most sensitive first."""
_UNDAMAGED = "undamaged"
_MIN_TWINS = 3
# The loss is here for comparison. The others are probes that the live metrics lack.
_PROBED = {
    "loss": ("loss",),
    "grad_norm_preclip": ("grad_norm_preclip",),
    "update_norm": ("update_norm",),
    "jacobian_energy": ("max_jacobian_energy", "mean_jacobian_energy"),
    "sign_diversity": ("min_sign_diversity", "mean_sign_diversity"),
}


@dataclass(frozen=True, slots=True)
class Family:
    """The runs of one setting and guard, and the twins with which they are compared."""

    recipe: str
    """The recipe's name. If it has several families, the setting, the guard and the rate of a run
    with a fault follow."""
    twins: tuple[Row, ...]
    exploded: tuple[Row, ...]
    survivors: tuple[Row, ...]
    """Runs that did not explode at a higher rate than the twins, or with a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScore(LeadScore):
    """The score of one metric over one family, whose twins are the healthy runs.

    The threshold is the smallest of `WIDENINGS` within the wanted rate of false alarms, over all
    families.
    """

    first_steps: tuple[int | None, ...]
    """The step of the first reading outside, for each explosion."""
    num_survivors_outside: int
    """Number of survivors with a reading outside. In those the metric follows the rate, not
    an explosion."""
    num_survivors: int
    """Number of survivors that recorded the metric."""
    num_unrecorded: int = 0
    """Number of explosions in runs that did not record the metric."""


def families_of(rows: Iterable[Row]) -> tuple[Family, ...]:
    """Group the rows with health series by setting and guard, sorted by recipe.

    Rows with a fault are also grouped by learning rate. A group needs an explosion or a survivor.
    """
    groups: dict[_Key, list[Row]] = defaultdict(list)
    for row in rows:
        if row.extra.get("health") and row.status != "failed":
            fault_rate = row.learning_rate if "fault_start" in row.extra else None
            groups[Setting.of(row), row.guard, fault_rate].append(row)
    found: dict[_Key, Family] = {}
    for key, own in sorted(groups.items(), key=lambda item: (item[0][0].recipe, str(item[0]))):
        twins = _twins_of(key, groups)
        exploded = tuple(row for row in own if row.explosion_step is not None)
        survivors = tuple(r for r in own if r.explosion_step is None and r not in twins)
        if exploded or survivors:
            found[key] = Family(key[0].recipe, twins, exploded, survivors)
    counts = Counter(family.recipe for family in found.values())
    return tuple(
        family if counts[family.recipe] == 1 else replace(family, recipe=_long_name(*key))
        for key, family in found.items()
    )


_Key = tuple[Setting, str, float | None]
"""Setting, guard, and the learning rate of a run with a fault."""


def _long_name(setting: Setting, guard: str, fault_rate: float | None) -> str:
    name = f"{setting} · {guard}"
    return name if fault_rate is None else f"{name} · {fault_rate:g}"


def _twins_of(key: _Key, groups: Mapping[_Key, Sequence[Row]]) -> tuple[Row, ...]:
    setting, guard, rate = key
    home = setting if rate is None else replace(setting, recipe=_UNDAMAGED)
    calm = [
        row
        for row in groups.get((home, guard, None), ())
        if row.explosion_step is None and row.status == "finished"
    ]
    if rate is None:
        rate = min((row.learning_rate for row in calm), default=math.nan)
    return tuple(row for row in calm if row.learning_rate == rate)


def metrics_of(row: Row) -> dict[str, tuple[str, ...]]:
    """Return the metrics of a row, each with the names of its series for `record_of`."""
    found = {name: tuple(s for s in own if record_of(row, s)) for name, own in _PROBED.items()}
    for series in row.extra.get("health", ()):
        metric, _, end = series.partition("/")
        if series != "step" and not end.startswith("num_"):  # these are counts
            found[metric] = (*found.get(metric, ()), series)
    return {metric: own for metric, own in found.items() if own}


def shared_metrics(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return the `metrics_of` the first row that all rows hold."""
    held = [metrics_of(row) for row in rows]
    return {m: s for m, s in held[0].items() if all(m in one for one in held)} if held else {}


def excess_of(row: Row, twins: Sequence[Row], series: Iterable[str]) -> dict[int, float]:
    """Return for each step how far the farthest of the series is outside the twins' range.

    The unit is the width of the range, and 0 means inside. inf means that a number is missing where
    a twin has one, or that a number is outside a range of zero width. The result leaves out steps
    near which the twins have no number, and series that the row has not recorded.
    """
    found: dict[int, float] = {}
    for name in series:
        if not _is_recorded(row, name):
            continue
        records = [record_of(twin, name) for twin in twins]
        mine = record_of(row, name) or dict.fromkeys(row.extra["health"]["step"])
        for step, value in mine.items():
            near = [
                v
                for record in records
                for s, v in record.items()
                if abs(s - step) <= NEAR_STEPS and v is not None
            ]
            # The first reading of every run has no rates of change. It must not count
            # as non-finite.
            has_twin = any(record.get(step) is not None for record in records)
            if near and (value is not None or has_twin):
                found[step] = max(found.get(step, 0.0), _excess(value, near))
    return found


def score_metrics(
    families: Sequence[Family], *, max_false_alarms: float, with_survivors: bool = False
) -> list[MetricScore]:
    """Judge every metric over every family, each at its smallest widening within one rate.

    Args:
        families: See `families_of`. A family with fewer than three twins is skipped: each twin is
            judged against the others, and a single other twin has no range.
        max_false_alarms: The most false alarms per 1,000 readings of all twins together. The
            widening is chosen on the same readings whose rate is reported, so expect a slightly
            higher rate in new runs.
        with_survivors: Also count a survivor that is outside as a false alarm. Otherwise a metric
            that follows the learning rate warns in every run at a higher rate.

    Returns:
        One score per metric and family. A metric is left out if no widening keeps it within the
        rate, or if some twin did not record it.
    """
    found: list[MetricScore] = []
    families = [family for family in families if len(family.twins) >= _MIN_TWINS]
    metrics = shared_metrics([twin for family in families for twin in family.twins])
    for metric, series in metrics.items():
        scorers = [_scorer(metric, series, family, with_survivors) for family in families]
        candidates = ([score(widening) for score in scorers] for widening in WIDENINGS)
        found += most_sensitive(candidates, max_false_alarms)
    return found


def _scorer(
    metric: str, series: Sequence[str], family: Family, with_survivors: bool
) -> Callable[[float], MetricScore]:
    """Measure how far all runs are outside of the twins' range, and return a score by widening."""
    twins = family.twins
    healthy = [excess_of(row, [t for t in twins if t is not row], series) for row in twins]
    exploded, survivors = (
        [
            (row, excess_of(row, twins, series))
            for row in rows
            if any(_is_recorded(row, name) for name in series)
        ]
        for rows in (family.exploded, family.survivors)
    )
    if with_survivors:
        healthy += [excess for _, excess in survivors]

    def score(widening: float) -> MetricScore:
        def outside(excess: dict[int, float]) -> list[int]:
            return [step for step, distance in excess.items() if distance > widening]

        leads: list[int | None] = []
        firsts: list[int | None] = []
        for row, excess in exploded:
            end = row.explosion_step or len(row.losses)
            lead = lead_time(row.losses, outside(excess), end, horizon_steps=row.num_steps)
            leads.append(lead)
            firsts.append(None if lead is None else departure_step(row.losses, end) - lead)
        return MetricScore(
            name=metric,
            recipe=family.recipe,
            threshold=widening,
            leads=tuple(leads),
            first_steps=tuple(firsts),
            num_false_alarms=sum(len(outside(excess)) for excess in healthy),
            num_healthy_readings=sum(len(excess) for excess in healthy),
            num_survivors_outside=sum(bool(outside(excess)) for _, excess in survivors),
            num_survivors=len(survivors),
            num_unrecorded=len(family.exploded) - len(exploded),
        )

    return score


def render_scores(scores: Sequence[MetricScore]) -> Table:
    """Return the scores as a table for the terminal, by recipe, best leads first."""

    def rank(line: MetricScore) -> tuple[str, float, float]:
        lead = line.median_lead
        return line.recipe, -line.num_ahead, math.inf if lead is None else -lead

    rows = []
    for line in sorted(scores, key=rank):
        ahead, lead, rate = line.cells()
        if line.num_unrecorded:
            ahead += f" ({line.num_unrecorded} not recorded)"
        firsts = [step for step in line.first_steps if step is not None]
        first = f"{min(firsts)}…{max(firsts)}" if firsts else NOTHING
        survivors = f"{line.num_survivors_outside} of {line.num_survivors}"
        survivors = survivors if line.num_survivors else NOTHING
        numbers = (f"{line.threshold:g}", ahead, lead, first, rate, survivors)
        rows.append((line.name, line.recipe, *numbers))
    columns = ["widening", "ahead", "lead,\nsteps", "first\noutside", "false\n/1,000"]
    return lean_table(["metric", "recipe"], [*columns, "survivors\noutside"], rows=rows)


def _is_recorded(row: Row, series: str) -> bool:
    """Return whether a series was recorded, even if none of its numbers was finite."""
    held = {*(row.extra.get("probes") or ()), *(row.extra.get("health") or ())}
    # Where no matrix ever had a finite number, only the count of matrices without one is recorded.
    metric = series.partition("/")[0]
    return series == "loss" or not held.isdisjoint((series, f"{metric}/num_nonfinite"))


def _excess(value: float | None, near: Sequence[float]) -> float:
    if value is None:
        return math.inf
    low, high = min(near), max(near)
    if low > 0:
        if value <= 0:
            return math.inf
        low, high, value = math.log(low), math.log(high), math.log(value)
    distance = max(low - value, value - high, 0.0)
    if distance == 0:
        return 0.0
    return distance / (high - low) if high > low else math.inf
