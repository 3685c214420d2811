"""When a live metric leaves the range of healthy twins: ahead of the loss, or for nothing.

One rule for all metrics [ours]. A reading at step t is outside where one of the metric's series
(smallest, median, largest over matrices; the whole model's) is farther from the twins' range than
a widening times that range's width. The range is that of all twins' readings within `NEAR_STEPS` of
t, on a logarithmic scale where all of them are above zero: what moves by powers of ten and what
moves by hundredths are judged alike. A number that is missing where the twins have one is outside;
of a metric that a run has not recorded at all, nothing is said of that run.

Twins are runs of the same recipe, optimizer, changes and guard, at its lowest learning rate, that
did not explode; of a recipe with a fault, the runs of `undamaged` at the fault's own rate. A twin
is judged against the others.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from hf_pss.evidence.early_warnings import Record, departure_step, lead_time, record_of, score_table
from hf_pss.evidence.rows import Row
from hf_pss.evidence.statistics import Setting

__all__ = [
    "NEAR_STEPS",
    "WIDENINGS",
    "Family",
    "MetricScore",
    "excess_of",
    "families_of",
    "metrics_of",
    "render_scores",
    "score_metrics",
    "shared_metrics",
]

NEAR_STEPS = 25
"""Twins' readings this near are compared with: a metric that only runs ahead is not outside."""
WIDENINGS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Tried in this order, the most sensitive first."""
_UNDAMAGED = "undamaged"
_MIN_TWINS = 3
# Of the probes, only what the live metrics do not hold; and the loss, to be compared with.
_PROBED = {
    "loss": ("loss",),
    "grad_norm_preclip": ("grad_norm_preclip",),
    "update_norm": ("update_norm",),
    "jacobian_energy": ("max_jacobian_energy", "mean_jacobian_energy"),
    "sign_diversity": ("min_sign_diversity", "mean_sign_diversity"),
}


@dataclass(frozen=True, slots=True)
class Family:
    """The runs of one setting and guard, and those that they are judged by."""

    recipe: str
    """And its setting, guard and fault's rate, where there are several of one recipe."""
    twins: tuple[Row, ...]
    exploded: tuple[Row, ...]
    survivors: tuple[Row, ...]
    """Neither: at a higher rate than the twins or with a fault, and no explosion came of it."""


@dataclass(frozen=True, slots=True)
class MetricScore:
    """What one metric did over one family."""

    metric: str
    recipe: str
    """The family's."""
    widening: float
    """The smallest of `WIDENINGS` within the wanted rate of false alarms, over all families."""
    leads: tuple[int | None, ...]
    """One an explosion: steps from the first reading outside to the loss's departure; of runs that
    recorded the metric."""
    first_steps: tuple[int | None, ...]
    """The step of that reading."""
    num_false_alarms: int
    """Readings of twins outside the range of the others; of survivors too, where they count."""
    num_healthy_readings: int
    num_survivors_outside: int
    """Survivors with a reading outside: what differs with the rate, not with the explosion."""
    num_survivors: int
    """That recorded the metric."""
    num_unrecorded: int = 0
    """Explosions in runs that did not."""

    @property
    def num_ahead(self) -> int:
        """Explosions that were warned of before the loss departed."""
        return sum(lead is not None and lead > 0 for lead in self.leads)

    @property
    def median_lead(self) -> float | None:
        """Over all explosions that a reading outside came for, late ones too."""
        known = [lead for lead in self.leads if lead is not None]
        return statistics.median(known) if known else None


def families_of(rows: Iterable[Row]) -> tuple[Family, ...]:
    """Group rows that hold health series by what a comparison of guards holds fixed, and by guard.

    Rows of a fault are grouped by learning rate, too. A group without an explosion and a survivor
    is none. Families are sorted by recipe.
    """
    watched = [row for row in rows if row.extra.get("health") and row.status != "failed"]
    groups: dict[_Key, list[Row]] = {}
    for row in watched:
        groups.setdefault(_key_of(row), []).append(row)
    found: dict[_Key, Family] = {}
    for key, own in sorted(groups.items(), key=lambda item: (item[0][0].recipe, str(item[0]))):
        twins = _twins_of(key, watched)
        exploded = tuple(row for row in own if row.explosion_step is not None)
        survivors = tuple(r for r in own if r.explosion_step is None and r not in twins)
        if exploded or survivors:
            found[key] = Family(key[0].recipe, twins, exploded, survivors)
    counts = Counter(family.recipe for family in found.values())
    return tuple(
        family if counts[family.recipe] == 1 else replace(family, recipe=_long_name(key))
        for key, family in found.items()
    )


_Key = tuple[Setting, str, float | None]
"""Setting, guard, and a fault's learning rate."""


def _key_of(row: Row) -> _Key:
    return Setting.of(row), row.guard, row.learning_rate if "fault_start" in row.extra else None


def _long_name(key: _Key) -> str:
    setting, guard, rate = key
    return " · ".join((str(setting), guard, *(() if rate is None else (f"{rate:g}",))))


def _twins_of(key: _Key, watched: Sequence[Row]) -> tuple[Row, ...]:
    setting, guard, fault_rate = key
    home = setting if fault_rate is None else replace(setting, recipe=_UNDAMAGED)
    calm = [
        row
        for row in watched
        if _key_of(row) == (home, guard, None)
        and row.explosion_step is None
        and row.status == "finished"
    ]
    lowest = min((row.learning_rate for row in calm), default=math.nan)
    rate = lowest if fault_rate is None else fault_rate
    return tuple(row for row in calm if row.learning_rate == rate)


def metrics_of(row: Row) -> dict[str, tuple[str, ...]]:
    """Return each metric that the row holds, with the names of its series for `record_of`."""
    found = {name: tuple(s for s in own if record_of(row, s)) for name, own in _PROBED.items()}
    for series in row.extra.get("health", ()):
        metric, _, end = series.partition("/")
        if series != "step" and not end.startswith("num_"):  # counts
            found[metric] = (*found.get(metric, ()), series)
    return {metric: own for metric, own in found.items() if own}


def shared_metrics(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return what `metrics_of` says of the first row, for metrics that all of the rows hold."""
    held = [metrics_of(row) for row in rows]
    return {m: s for m, s in held[0].items() if all(m in one for one in held)} if held else {}


def excess_of(row: Row, twins: Sequence[Row], series: Iterable[str]) -> dict[int, float]:
    """Return, a step, how far the farthest of the series is outside of the twins' range.

    In widths of the range; 0 is inside, inf a number that is missing where a twin has one, or
    outside of a range without width. Steps near which the twins have no number are left out, and so
    are series that the row has not recorded; empty where that is all of them.
    """
    found: dict[int, float] = {}
    for name in series:
        if not _is_recorded(row, name):
            continue
        records = [record for twin in twins if (record := record_of(twin, name))]
        mine = record_of(row, name) or _without_numbers(row)
        for step, value in zip(mine.steps, mine.values, strict=True):
            near = [
                (s, v)
                for record in records
                for s, v in zip(record.steps, record.values, strict=True)
                if abs(s - step) <= NEAR_STEPS and v is not None
            ]
            # A first reading lacks rates of change in every run: that is nobody's trouble.
            if near and (value is not None or any(s == step for s, _ in near)):
                excess = _excess(value, [v for _, v in near])
                found[step] = max(found.get(step, 0.0), excess)
    return found


def score_metrics(
    families: Sequence[Family], *, max_false_alarms: float, with_survivors: bool = False
) -> tuple[MetricScore, ...]:
    """Judge every metric over every family, each at its smallest widening within one rate.

    Args:
        families: See `families_of`. One with fewer than three twins is passed over: a twin is
            judged against the others, and one other has no range.
        max_false_alarms: Per 1,000 readings of all twins together. Chosen on the same readings that
            it is reported of: new runs will show a little more.
        with_survivors: Whether a survivor outside is a false alarm too. Without, what differs with
            the learning rate warns of every explosion, and of everything else at that rate.

    Returns:
        Metric × family; a metric that no widening keeps within the rate, or that some twin did not
        record, is left out.
    """
    found: list[MetricScore] = []
    families = [family for family in families if len(family.twins) >= _MIN_TWINS]
    metrics = shared_metrics([twin for family in families for twin in family.twins])
    for metric, series in metrics.items():
        measured = [_measure(family, series, with_survivors) for family in families]
        for widening in WIDENINGS:
            scores = [_score(metric, one, widening) for one in measured]
            readings = sum(score.num_healthy_readings for score in scores)
            alarms = sum(score.num_false_alarms for score in scores)
            if 1000 * alarms <= max_false_alarms * readings:
                found += (score for score in scores if score.num_healthy_readings)
                break
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Measured:
    family: Family
    healthy: tuple[dict[int, float], ...]
    exploded: tuple[tuple[Row, dict[int, float]], ...]
    survivors: tuple[dict[int, float], ...]
    num_unrecorded: int


def _measure(family: Family, series: Sequence[str], with_survivors: bool) -> _Measured:
    twins = family.twins
    calm = tuple(excess_of(row, [t for t in twins if t is not row], series) for row in twins)

    def recorded(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if any(_is_recorded(row, name) for name in series)]

    survivors = tuple(excess_of(row, twins, series) for row in recorded(family.survivors))
    exploded = tuple((row, excess_of(row, twins, series)) for row in recorded(family.exploded))
    return _Measured(
        family,
        (*calm, *survivors) if with_survivors else calm,
        exploded,
        survivors,
        len(family.exploded) - len(exploded),
    )


def _score(metric: str, measured: _Measured, widening: float) -> MetricScore:
    def outside(excess: dict[int, float]) -> list[int]:
        return sorted(step for step, distance in excess.items() if distance > widening)

    leads: list[int | None] = []
    firsts: list[int | None] = []
    for row, excess in measured.exploded:
        met = row.explosion_step or len(row.losses)
        lead = lead_time(row.losses, outside(excess), met, horizon_steps=row.num_steps)
        leads.append(lead)
        firsts.append(None if lead is None else departure_step(row.losses, met) - lead)
    return MetricScore(
        metric,
        measured.family.recipe,
        widening,
        tuple(leads),
        tuple(firsts),
        sum(len(outside(excess)) for excess in measured.healthy),
        sum(len(excess) for excess in measured.healthy),
        sum(bool(outside(excess)) for excess in measured.survivors),
        len(measured.survivors),
        measured.num_unrecorded,
    )


_COLUMNS = (
    "metric",
    "recipe",
    "widening",
    "ahead",
    "lead, steps",
    "first outside",
    "false /1,000",
    "survivors outside",
)


def render_scores(scores: Sequence[MetricScore]) -> Table:
    """Return the scores as a table for the terminal, a recipe after the other, best leads first."""
    return score_table(_COLUMNS, map(_cells, sorted(scores, key=_rank)))


def _rank(line: MetricScore) -> tuple[str, float, float]:
    lead = line.median_lead
    return line.recipe, -line.num_ahead, math.inf if lead is None else -lead


def _cells(line: MetricScore) -> tuple[str, ...]:
    leads = [lead for lead in line.leads if lead is not None]
    firsts = [step for step in line.first_steps if step is not None]
    return (
        line.metric,
        line.recipe,
        f"{line.widening:g}",
        _ahead(line),
        f"{line.median_lead:g} ({min(leads)}…{max(leads)})" if leads else "–",
        f"{min(firsts)}…{max(firsts)}" if firsts else "–",
        f"{1000 * line.num_false_alarms / line.num_healthy_readings:.2g}",
        f"{line.num_survivors_outside} of {line.num_survivors}" if line.num_survivors else "–",
    )


def _ahead(line: MetricScore) -> str:
    told = f"{line.num_ahead} of {len(line.leads)}" if line.leads else "–"
    return f"{told} ({line.num_unrecorded} not recorded)" if line.num_unrecorded else told


def _is_recorded(row: Row, series: str) -> bool:
    """Tell a series that was never written from one whose numbers were not finite."""
    held = {*(row.extra.get("probes") or ()), *(row.extra.get("health") or ())}
    # Where no matrix ever had a finite number, there is only how many had none.
    return series == "loss" or not held.isdisjoint((series, f"{_metric_of(series)}/num_nonfinite"))


def _metric_of(series: str) -> str:
    return series.partition("/")[0]


def _without_numbers(row: Row) -> Record:
    steps = tuple(row.extra["health"]["step"])
    return Record(steps, (None,) * len(steps))


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
