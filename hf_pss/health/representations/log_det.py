"""Log-determinant of the Gram matrix of tokens, and what a sample of them proves about all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.health.representations.token_cosine import unit_tokens

__all__ = ["DEFAULT_RIDGE", "LogDetBounds", "gram_log_det", "log_det_bounds"]

# [ours] A direction below a thousandth of one token's energy counts as lost.
DEFAULT_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class LogDetBounds:
    """L = log det(X̂X̂ᵀ + εI) of a sample, and an interval that holds that of all N tokens.

    All (...), float32 or float64, in nats.
    """

    sample: Tensor
    """L of the sample's n tokens."""
    lower: Tensor
    """L of all N tokens is not below it, whatever the others are (none of them zero)."""
    upper: Tensor
    """L of all N tokens is not above it, whatever the others are."""


def gram_log_det(tokens: Tensor, *, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Return log det(X̂X̂ᵀ + εI), the log-volume that the normalised tokens span.

    The quantity that arXiv 2601.03385 tracks over time; tokens of unit length and the ridge ε,
    without which more tokens than dimensions give −∞, are [ours]. It lies between
    n log ε + log(1 + n/ε), all tokens on one line, and n log(1 + ε), all orthogonal. It is not
    comparable between numbers of tokens or ridges.

    Cost: the singular values of an n × d matrix, 17 ms at 256×768 on one CPU thread; squaring it
    first would lose those below 3e-4.

    Args:
        tokens: (..., n, d), any real floating dtype.
        ridge: ε > 0, against a token's own 1.

    Returns:
        (...), float32, or float64 for float64; NaN for no tokens, or where one holds NaN or inf.

    >>> round(gram_log_det(torch.eye(3), ridge=1.0).item(), 4)  # 3 log 2
    2.0794
    """
    return log_det_bounds(tokens, tokens.shape[-2], ridge=ridge).sample


def log_det_bounds(
    tokens: Tensor, num_tokens: int, *, ridge: float = DEFAULT_RIDGE
) -> LogDetBounds:
    """Bound L of N tokens by n of them, deterministically: no assumption on how they were drawn.

    [ours], for the published bounds are not public; proofs in docs/theory_health.md. With
    a₁ ≥ … ≥ a_d the eigenvalues of X̂ᵀX̂ + εI of the sample, and k = N − n,

    - lower: L_n + k log ε + log(1 + k/a₁): the others all along the sample's first direction;
    - upper: L_n + k log ε + Σ_i log max(w/a_i, 1) over the min(k, d) smallest, with w such that
      Σ_i max(w − a_i, 0) = k: the others where the sample is weakest.

    Either is attained, so no better bound can be had of the sample's spectrum. The interval is
    narrow where the sample is most of all tokens; else it is as wide as what it cannot know.

    Args:
        tokens: (..., n, d), any real floating dtype: the sample.
        num_tokens: N ≥ n.
        ridge: as in `gram_log_det`.

    Raises:
        ConfigurationError: ridge not above 0, or N < n.

    >>> bounds = log_det_bounds(torch.eye(2), 4, ridge=1.0)  # two more tokens
    >>> round(bounds.lower.exp().item(), 4), round(bounds.upper.exp().item(), 4)
    (8.0, 9.0)
    """
    n, d = tokens.shape[-2:]
    if not ridge > 0 or num_tokens < n:
        raise ConfigurationError(
            f"You gave ridge={ridge}, num_tokens={num_tokens} with a sample of {n}; give a ridge "
            "above 0 and at least as many tokens as the sample has."
        )
    x = unit_tokens(tokens)
    if n == 0 or d == 0:
        nothing = x.new_full(x.shape[:-2], torch.nan)
        return LogDetBounds(nothing, nothing, nothing)
    finite = x.isfinite().all(dim=-1).all(dim=-1)
    x = torch.where(finite[..., None, None], x, 0.0)
    energy = torch.linalg.svdvals(x).square()
    # Of the d eigenvalues of A, those beyond min(n, d) are ε.
    a = torch.nn.functional.pad(energy, (0, d - energy.shape[-1])) + ridge
    k = num_tokens - n
    sample = n * math.log(ridge) + (a / ridge).log().sum(dim=-1)
    beyond = sample + k * math.log(ridge)
    lower = beyond + torch.log1p(k / a[..., 0])
    upper = beyond + _flooding(a.flip(-1)[..., : min(k, d)], k)
    upper = torch.maximum(upper, lower)  # rounding must not cross them
    return LogDetBounds(*(torch.where(finite, v, torch.nan) for v in (sample, lower, upper)))


def _flooding(rising: Tensor, amount: int) -> Tensor:
    """Return Σ log max(w/a_i, 1), Σ max(w − a_i, 0) = amount, for a (..., j) in ascending order."""
    count = torch.arange(1, rising.shape[-1] + 1, device=rising.device, dtype=rising.dtype)
    levels = (rising.cumsum(dim=-1) + amount) / count
    # With the j lowest flooded the level must not lie below the j-th; the last such j is right.
    num_flooded = (levels >= rising).sum(dim=-1, keepdim=True)
    level = levels.gather(-1, (num_flooded - 1).clamp_min(0)) if amount else levels
    return (level / rising).clamp_min(1.0).log().sum(dim=-1)
