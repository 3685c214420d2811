"""Muon, which moves along the momentum's polar factor, and NorMuon, which equalises its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError, check_choice
from hf_pss.linalg import POLYNOMIAL_SCHEDULES, newton_schulz
from hf_pss.optim.rules import UPDATE_SCALES, Options, Rule, State

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def polar_direction(momenta: Tensor, options: Options) -> Tensor:
    """Return UVᵀ of each momentum UΣVᵀ, as exact as the schedule's band, without the update scale.

    Args:
        momenta: (b, m, n), float32.
        options: The options ``schedule``, ``num_steps`` and ``dtype``.
    """
    return newton_schulz(
        momenta,
        schedule=options["schedule"],
        num_steps=options["num_steps"],
        dtype=_DTYPES.get(options["dtype"]) or fast_dtype(momenta),
    )


def fast_dtype(tensor: Tensor) -> torch.dtype:
    """Return bfloat16 if the device multiplies it faster than float32, and else float32."""
    if not tensor.is_cpu:
        return torch.bfloat16
    # Releases of torch up to 2.9 lack this function. They use float32.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_native = known.get("avx512_bf16") or known.get("amx_bf16")
    return torch.bfloat16 if is_native else torch.float32


def check_polar(options: Options) -> None:
    """Check the options of `polar_direction`.

    Raises:
        ConfigurationError: A name is unknown, or num_steps is below 1.
    """
    check_choice("schedule", options["schedule"], POLYNOMIAL_SCHEDULES)
    check_choice("dtype", options["dtype"], ("auto", *_DTYPES))
    num_steps = options["num_steps"]
    if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
        raise ConfigurationError(f"num_steps must be 1 or more, or None; you gave {num_steps!r}.")


def _muon(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    scale = UPDATE_SCALES[options["scale"]](*momenta.shape[-2:])
    return polar_direction(momenta, options).mul_(scale), {}


def _normuon(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    polar = polar_direction(momenta, options)
    beta, eps = options["row_beta"], options["row_eps"]
    mean_squares = polar.square().mean(dim=-1)
    average = state.get("row_mean_square", torch.zeros_like(mean_squares))
    average = torch.lerp(average, mean_squares, 1 - beta)
    even = polar / (average.sqrt() + eps).unsqueeze(-1)
    norms = torch.linalg.matrix_norm(torch.stack((polar, even)), keepdim=True)
    scale = UPDATE_SCALES[options["scale"]](*momenta.shape[-2:])
    return even * (scale * norms[0] / norms[1].clamp_min(eps)), {"row_mean_square": average}


def _check_normuon(options: Options) -> None:
    check_polar(options)
    if not 0 <= options["row_beta"] < 1 or not options["row_eps"] > 0:
        raise ConfigurationError(
            f"You gave row_beta={options['row_beta']}, row_eps={options['row_eps']}; the first "
            "must be in [0, 1), and the second above 0."
        )


_POLAR = {"schedule": "polar_express_4", "num_steps": None, "dtype": "auto"}

MUON = Rule(defaults=_POLAR, check=check_polar, direction=_muon)
"""K. Jordan et al. 2024, kellerjordan.github.io/posts/muon: D = s(m, n) · UVᵀ.

``schedule`` and ``num_steps`` are those of `newton_schulz`. ``dtype`` is the type of the iteration.
``auto`` means bfloat16 if the device multiplies it faster than float32.
"""

NORMUON = Rule(
    defaults={**_POLAR, "row_beta": 0.95, "row_eps": 1e-8},
    check=_check_normuon,
    direction=_normuon,
)
"""Li et al. 2025, arXiv 2510.05491. Let O = UVᵀ and v ← β₂ v + (1 − β₂) mean_j O_ij². Then:

    Ô_ij = O_ij / (√v_i + ε),   D = s(m, n) · ‖O‖_F / ‖Ô‖_F · Ô.

``row_beta`` is β₂, and ``row_eps`` is ε. The paper's factor 0.2·√(mn) / ‖Ô‖_F equals the factor of
`rms_match` if ‖O‖_F = √min(m, n).
"""
