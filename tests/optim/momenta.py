"""Momenta with known spectra, and what every rule's test asks of its directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_pss.optim.rules import UPDATE_SCALES, Rule, State

# Vectors, wide, tall and square.
SHAPES = [(1, 9), (9, 1), (24, 40), (40, 24), (32, 32)]
SCALE = "rms_match"
# Of the largest entry: the same matrix alone and in a stack.
ALONE = 5e-7  # 0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(
    m: int, n: int, *, seed: int = 0, condition: float = 10.0, turned: float = 0.0
) -> Tensor:
    """Return a float32 matrix with singular values from 1 to 1/condition.

    Its singular vectors turn with ``turned``.
    """
    size = min(m, n)
    u, v = (
        torch.linalg.qr(
            noise(length, size, seed=seed + side).double()
            + turned * noise(length, size, seed=seed + side + 2).double()
        ).Q
        for side, length in enumerate((m, n))
    )
    sigma = torch.logspace(0, -1, size, dtype=torch.float64) ** torch.tensor(condition).log10()
    matrix: Tensor = (u * sigma) @ v.mT
    return matrix.float()


def series(m: int, n: int, num_steps: int) -> list[Tensor]:
    """Return momenta that turn and grow, of which none is ill-conditioned."""
    return [(1 + t / num_steps) * spread(m, n, turned=t / num_steps) for t in range(num_steps)]


def options_of(rule: Rule, **options: Any) -> dict[str, Any]:
    exact = {"schedule": "polar_express", "dtype": "float32"}
    own = {name: value for name, value in exact.items() if name in rule.defaults}
    return {**rule.defaults, **own, "scale": SCALE, "lr": 0.02, "step": 1, **options}


def scale_of(matrix: Tensor) -> float:
    m, n = matrix.shape[-2:]
    return UPDATE_SCALES[SCALE](m, n)


def error(direction: Tensor, reference: Tensor) -> float:
    """Return the largest difference, as a share of the largest entry."""
    largest = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((direction.double() - reference).abs().max() / largest)


def check_stack(rule: Rule, state: State, **options: Any) -> None:
    """Three matrices of a stack, the middle one broken, and the outer ones alone."""
    given = options_of(rule, **options)
    stack = torch.stack([spread(12, 8, seed=0), noise(12, 8), spread(12, 8, seed=4)])
    stack[1, 3, 2] = torch.inf
    together, kept = rule.direction(stack, state, given)
    assert together[1].isnan().all()
    for i in (0, 2):
        one = {name: value[i : i + 1] for name, value in state.items()}
        alone, after = rule.direction(stack[i : i + 1], one, given)
        assert error(together[i], alone[0].double()) <= ALONE
        for name, value in after.items():
            assert error(kept[name][i], value[0].double()) <= ALONE


def check_zero(rule: Rule, **options: Any) -> None:
    for shape in SHAPES:
        directions, _ = rule.direction(torch.zeros(2, *shape), {}, options_of(rule, **options))
        assert torch.equal(directions, torch.zeros(2, *shape))
