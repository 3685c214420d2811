"""The table of health metrics: the level and the cost of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Cost: TypeAlias = Literal["light", "standard", "full"]
"""How often you can afford a metric: every step (light), every few steps (standard), or sampled
steps (full). A preset measures every metric up to its own level. docs/health.md has the times."""

Level: TypeAlias = Literal["weights", "gradients", "updates", "optimizer", "representations"]
"""The tensors that a metric reads."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    level: Level
    cost: Cost
    in_runs: bool = True
    """Whether `HealthMonitor` measures the metric. You call the other metrics yourself."""


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "spectral_norm": Metric("weights", "light"),
        "stable_rank": Metric("weights", "light"),
        "frobenius_norm": Metric("weights", "light"),
        "change_rate": Metric("weights", "light"),
        "low_rank_distance": Metric("weights", "full"),
        "effective_rank": Metric("weights", "full"),
        "neighbour_alignment": Metric("weights", "full"),
        "grad_norm": Metric("gradients", "light"),
        "spike_score": Metric("gradients", "light"),
        "jacobian_energy": Metric("gradients", "full", in_runs=False),
        "update_norm": Metric("updates", "standard", in_runs=False),
        "relative_update": Metric("updates", "standard"),
        "spectral_edge": Metric("updates", "standard"),
        "sqrt_condition": Metric("optimizer", "standard"),
        "exceptional_distance": Metric("optimizer", "light", in_runs=False),
        "commutator_size": Metric("optimizer", "full", in_runs=False),
        "token_cosine": Metric("representations", "full"),
        "gram_log_det": Metric("representations", "full"),
        "token_mean_share": Metric("representations", "full"),
        "token_top_share": Metric("representations", "full"),
        "token_centred_top_share": Metric("representations", "full"),
        "token_effective_rank": Metric("representations", "full"),
        "sign_diversity": Metric("representations", "full"),
        "attention_logit_bound": Metric("representations", "full"),
        "attention_logit_max": Metric("representations", "full"),
    }
)
"""Every metric by name, which is the last part of a scalar's name in reports. docs/health.md has
the formula, the unit and the source of each. The mapping is read-only."""
