"""Rows of runs that nobody ran."""

from __future__ import annotations

from typing import Any

from hf_pss.evidence.rows import Row, Setting

SETTING = Setting("tiny", "adamw")
ENTROPY = 6.0


def row(
    guard: str = "clip", rate: float = 1e-3, seed: int = 0, loss: float | None = 4.0, **more: Any
) -> Row:
    fields: dict[str, Any] = {
        "id": f"{guard}-{rate}-{seed}",
        "recipe": SETTING.recipe,
        "optimizer": SETTING.optimizer,
        "num_steps": 4,
        "status": "finished",
        "unigram_entropy": ENTROPY,
        "losses": (5.0, 4.8, 4.5, 4.2),
        "grad_norms": (1.0, 1.0, 1.0, 1.0),
        "eval_steps": (2, 4),
        "eval_losses": (4.6, loss),
        "train_seconds": 2.0,
        "guard_seconds": 0.01,
    }
    return Row(
        guard=guard,
        learning_rate=rate,
        seed=seed,
        final_eval_loss=loss,
        **(fields | more),
    )


def grid_of_rows() -> list[Row]:
    """Two guards, three rates, three seeds; `clip` is good at one rate, `floor` at two."""
    losses = {
        "clip": {1e-3: 4.0, 1e-2: 4.5, 1e-1: None},
        "floor": {1e-3: 3.92, 1e-2: 3.9, 1e-1: 4.4},
    }
    return [
        row(
            guard,
            rate,
            seed,
            None if loss is None else loss + 0.01 * seed,
            **({"explosion_kind": "rise", "explosion_step": 3} if loss is None else {}),
        )
        for guard, by_rate in losses.items()
        for rate, loss in by_rate.items()
        for seed in range(3)
    ]
