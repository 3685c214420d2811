"""The table of health metrics: name, unit, source and cost of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["METRICS", "PRESETS", "Cost", "Level", "Metric", "metrics_of"]

Cost: TypeAlias = Literal["light", "standard", "full"]
"""The cost of a metric: cheap enough for every step, for every few steps, or for sampled steps.
docs/health.md has the times."""

Level: TypeAlias = Literal["weights", "gradients", "updates", "optimizer", "representations"]
"""The tensors that a metric reads."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """The unique name. It is the last part of a scalar's name in reports."""
    level: Level
    unit: str
    """"1" for a number without unit. "weight" and "gradient" mean the units of those tensors."""
    cost: Cost
    module: str
    """The module that computes the metric, below `hf_pss`."""
    source: str
    """The publication of the formula, or a formula from a textbook, or "ours"."""
    in_runs: bool = True
    """Whether `HealthMonitor` measures the metric. You call the other metrics yourself."""


_LOW_RANK = "Eckart & Young 1936; arXiv 2402.03991; relative: ours"
_MEASUREMENTS = "models.measurements"
_OPERATOR = "update_operator"
_TOKENS = "representations"
# For each level: name, unit, cost, module below `hf_pss.health` unless it has a dot, source.
_ROWS: Mapping[Level, tuple[tuple[str, str, Cost, str, str], ...]] = {
    "weights": (
        ("spectral_norm", "weight", "light", "tracked", "Golub & Van Loan"),
        ("stable_rank", "1", "light", "tracked", "arXiv 2602.01308"),
        ("frobenius_norm", "weight", "light", "tracked", "‖W‖_F"),
        ("change_rate", "1/step", "light", "relative_update", "ours"),
        ("low_rank_distance", "1", "full", "spectrum_metrics", _LOW_RANK),
        ("effective_rank", "1", "full", "spectrum_metrics", "Roy & Vetterli 2007"),
        ("neighbour_alignment", "1", "full", "alignment", "arXiv 2602.01734"),
    ),
    "gradients": (
        ("grad_norm", "gradient", "light", _MEASUREMENTS, "‖G‖_F"),
        ("spike_score", "1", "light", "spike_score", "OLMo-core; NaN: ours"),
        ("jacobian_energy", "1", "full", "jacobian_energy", "arXiv 2602.01308; projection: ours"),
    ),
    "updates": (
        ("update_norm", "weight", "standard", _MEASUREMENTS, "‖ΔW‖_F"),
        (
            "relative_update",
            "1/step",
            "standard",
            "relative_update",
            "arXiv 1708.03888, 1904.00962",
        ),
        ("spectral_edge", "1", "standard", "spectral_edge", "arXiv 2603.28964; projections: ours"),
    ),
    "optimizer": (
        ("sqrt_condition", "1", "standard", _OPERATOR, "arXiv 2605.23476; trimmed: ours"),
        ("exceptional_distance", "1", "light", _OPERATOR, "arXiv 2605.23476; relative: ours"),
        (
            "commutator_size",
            "hessian/gradient",
            "full",
            _OPERATOR,
            "arXiv 2605.23476; sampling: ours",
        ),
    ),
    "representations": (
        ("token_cosine", "1", "full", _TOKENS, "arXiv 2602.01308"),
        ("gram_log_det", "nat", "full", _TOKENS, "arXiv 2601.03385; bounds: ours"),
        ("token_mean_share", "1", "full", _TOKENS, "Papyan et al. 2020, NC1; ours"),
        ("token_top_share", "1", "full", _TOKENS, "one over the stable rank"),
        ("token_centred_top_share", "1", "full", _TOKENS, "ours"),
        ("token_effective_rank", "1", "full", _TOKENS, "Roy & Vetterli 2007"),
        ("sign_diversity", "1", "full", "sign_diversity", "arXiv 2510.04202; the number: ours"),
        ("attention_logit_bound", "1", "full", _TOKENS, "Cauchy–Schwarz"),
        ("attention_logit_max", "1", "full", "meter", "arXiv 2507.20534"),
    ),
}
_ON_DEMAND = {"jacobian_energy", "update_norm", "exceptional_distance", "commutator_size"}

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        name: Metric(
            name=name,
            level=level,
            unit=unit,
            cost=cost,
            module=module if "." in module else f"health.{module}",
            source=source,
            in_runs=name not in _ON_DEMAND,
        )
        for level, rows in _ROWS.items()
        for name, unit, cost, module, source in rows
    }
)
"""Every metric by name. The mapping is read-only."""

_ORDER: tuple[Cost, ...] = ("light", "standard", "full")


def metrics_of(cost: Cost) -> tuple[str, ...]:
    """Return the names of all metrics that a run with this preset measures, in the table's order.

    >>> metrics_of("light")[:2], "jacobian_energy" in metrics_of("full")
    (('spectral_norm', 'stable_rank'), False)
    """
    allowed = _ORDER[: _ORDER.index(cost) + 1]
    return tuple(row.name for row in METRICS.values() if row.in_runs and row.cost in allowed)


PRESETS: Mapping[Cost, tuple[str, ...]] = MappingProxyType({c: metrics_of(c) for c in _ORDER})
"""The names of the metrics of each preset. Each preset contains the previous one."""
