"""Rows with health series, of runs that nobody ran."""

from __future__ import annotations

import math
from typing import Any

from hf_pss.evidence.rows import Row

STEPS = tuple(range(10, 301, 10))
DEPARTURE = 201
EXPLOSION = 240


def watched(
    rate: float = 1e-3,
    seed: int = 0,
    *,
    rank: list[float | None] | None = None,
    explosion_step: int | None = None,
    recipe: str = "tiny",
    **more: Any,
) -> Row:
    """A run whose stable ranks fall from 20, a hundredth apart from seed to seed."""
    calm = [20 - 0.02 * step + 0.2 * seed for step in STEPS]
    rise = 0.05 if explosion_step else 0.0
    return Row(
        id=f"{recipe}-{rate}-{seed}",
        recipe=recipe,
        optimizer="adamw",
        learning_rate=rate,
        guard="watched",
        seed=seed,
        num_steps=300,
        final_eval_loss=4.0,
        unigram_entropy=6.0,
        losses=tuple(
            5 - 0.005 * min(t, 200) + rise * max(0, t - 198) + 0.01 * math.sin(t + seed)
            for t in range(1, 301)
        ),
        eval_steps=(300,),
        eval_losses=(4.0,),
        train_seconds=1.0,
        explosion_step=explosion_step,
        explosion_kind="rise" if explosion_step else None,
        extra={
            "health": {
                "step": list(STEPS),
                "stable_rank/min": calm if rank is None else rank,
                "stable_rank/num_nonfinite": [None] * len(STEPS),
                "stable_rank/num_stale": [float(step) for step in STEPS],
                "spectral_edge": [None, *[1.0 + 0.01 * (i + seed) for i in range(29)]],
            },
            **more,
        },
    )


def falling(start: int) -> list[float | None]:
    """The stable ranks of a twin, halved from a step on."""
    return [(20 - 0.02 * step) * (0.5 if step >= start else 1.0) for step in STEPS]


def family_of_rows() -> list[Row]:
    """Three twins, two explosions, and one run at a rate between."""
    return [
        *(watched(seed=seed) for seed in range(3)),
        watched(1e-2, 0, rank=falling(100), explosion_step=EXPLOSION),
        watched(1e-2, 1, rank=falling(150), explosion_step=EXPLOSION),
        watched(3e-3, 0, rank=falling(280)),
    ]
