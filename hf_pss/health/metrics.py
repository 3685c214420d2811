"""The table of health metrics: what each is called, its unit, its source and its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["METRICS", "PRESETS", "Cost", "Level", "Metric", "metrics_of"]

Cost: TypeAlias = Literal["light", "standard", "full"]
"""For every step, for every few, or for sampled ones; docs/health.md has the measured times."""

Level: TypeAlias = Literal["weights", "gradients", "updates", "optimizer", "representations"]
"""What a metric is read from."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; the code is in the module of `hf_pss` that `module` names."""

    name: str
    """Unique: the last part of a scalar's name where it is reported."""
    level: Level
    unit: str
    """"1" for a number without unit; "weight" and "gradient" for the units of those."""
    cost: Cost
    module: str
    """Below `hf_pss`."""
    source: str
    """Where the formula was published, or the formula where it is a textbook's; "ours" where it was
    not."""
    in_runs: bool = True
    """Whether `HealthMonitor` measures it; the others are called on demand."""


_ROWS = (
    Metric("spectral_norm", "weights", "weight", "light", "health.tracked", "Golub & Van Loan"),
    Metric("stable_rank", "weights", "1", "light", "health.tracked", "arXiv 2602.01308"),
    Metric("frobenius_norm", "weights", "weight", "light", "health.tracked", "‖W‖_F"),
    Metric("change_rate", "weights", "1/step", "light", "health.relative_update", "ours"),
    Metric(
        "low_rank_distance",
        "weights",
        "1",
        "full",
        "health.low_rank_distance",
        "Eckart & Young 1936; arXiv 2402.03991; relative: ours",
    ),
    Metric(
        "effective_rank", "weights", "1", "full", "health.singular_values", "Roy & Vetterli 2007"
    ),
    Metric("neighbour_alignment", "weights", "1", "full", "health.alignment", "arXiv 2602.01734"),
    Metric("grad_norm", "gradients", "gradient", "light", "models.measurements", "‖G‖_F"),
    Metric("spike_score", "gradients", "1", "light", "health.spike_score", "OLMo-core; NaN: ours"),
    Metric(
        "jacobian_energy",
        "gradients",
        "1",
        "full",
        "health.jacobian_energy",
        "arXiv 2602.01308; projection: ours",
        in_runs=False,
    ),
    Metric(
        "update_norm",
        "updates",
        "weight",
        "standard",
        "models.measurements",
        "‖ΔW‖_F",
        in_runs=False,
    ),
    Metric(
        "relative_update",
        "updates",
        "1/step",
        "standard",
        "health.relative_update",
        "arXiv 1708.03888, 1904.00962",
    ),
    Metric(
        "spectral_edge",
        "updates",
        "1",
        "standard",
        "health.spectral_edge",
        "arXiv 2603.28964; projections: ours",
    ),
    Metric(
        "sqrt_condition",
        "optimizer",
        "1",
        "standard",
        "health.preconditioner",
        "arXiv 2605.23476; trimmed: ours",
    ),
    Metric(
        "exceptional_distance",
        "optimizer",
        "1",
        "light",
        "health.relative_update",
        "arXiv 2605.23476; relative: ours",
        in_runs=False,
    ),
    Metric(
        "commutator_size",
        "optimizer",
        "hessian/gradient",
        "full",
        "health.alignment",
        "arXiv 2605.23476; sampling: ours",
        in_runs=False,
    ),
    *(
        Metric(name, "representations", unit, "full", f"health.{module}", source)
        for name, unit, module, source in (
            ("token_cosine", "1", "representations", "arXiv 2602.01308"),
            ("gram_log_det", "nat", "representations", "arXiv 2601.03385; bounds: ours"),
            ("token_mean_share", "1", "representations", "Papyan et al. 2020, NC1; ours"),
            ("token_top_share", "1", "representations", "one over the stable rank"),
            ("token_centred_top_share", "1", "representations", "ours"),
            ("token_effective_rank", "1", "representations", "Roy & Vetterli 2007"),
            ("sign_diversity", "1", "sign_diversity", "arXiv 2510.04202; the number: ours"),
            ("attention_logit_bound", "1", "representations", "Cauchy–Schwarz"),
            ("attention_logit_max", "1", "meter", "arXiv 2507.20534"),
        )
    ),
)

METRICS: Mapping[str, Metric] = MappingProxyType({row.name: row for row in _ROWS})
"""Every metric by name, read-only."""

_ORDER: tuple[Cost, ...] = ("light", "standard", "full")


def metrics_of(cost: Cost) -> tuple[str, ...]:
    """Return the names of all metrics that a run of this preset measures, in the table's order.

    >>> metrics_of("light")[:2], "jacobian_energy" in metrics_of("full")
    (('spectral_norm', 'stable_rank'), False)
    """
    allowed = _ORDER[: _ORDER.index(cost) + 1]
    return tuple(row.name for row in _ROWS if row.in_runs and row.cost in allowed)


PRESETS: Mapping[Cost, tuple[str, ...]] = MappingProxyType({c: metrics_of(c) for c in _ORDER})
"""Names by preset: each holds the one before it."""
