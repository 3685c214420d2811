"""Metrics of hidden states: collapse, cosine and volume of tokens, and a bound of attention logits.

All are functions of a sample of tokens, which `hf_pss.health.meter` takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import effective_rank, spectral_norm
from hf_pss.linalg.scaling import compute_dtype, unit_scaled

__all__ = [
    "DEFAULT_RIDGE",
    "CollapseMeasures",
    "LogDetBounds",
    "TokenMask",
    "attention_logit_bound",
    "collapse_measures",
    "gram_log_det",
    "log_det_bounds",
    "token_cosine",
    "unit_tokens",
]


class TokenMask:
    """The positions of the tokens that count, on the host. Creating it reads once from the device.

    Args:
        mask: (batch, tokens), nonzero where a token counts.
    """

    def __init__(self, mask: Tensor) -> None:
        self.positions = mask.reshape(-1).cpu().nonzero().flatten()
        """Positions in the flattened batch, int64."""
        self.shape = tuple(mask.shape)

    @property
    def hides_some(self) -> bool:
        """Whether the mask excludes a token."""
        return len(self.positions) < math.prod(self.shape)

    def fits(self, hidden: Tensor) -> bool:
        """Return whether hidden states fit the shape of the mask.

        Their shape is (batch, tokens, d) or (batch · tokens, d). Hidden states of an image, of a
        different sequence or with virtual tokens do not fit.
        """
        return hidden.shape[:-1] in (self.shape, (math.prod(self.shape),))


def token_cosine(tokens: Tensor) -> Tensor:
    """Return the mean of cos(x_i, x_j) over all pairs i ≠ j, exactly and without an n × n matrix.

    The mean is (‖Σ x̂‖² − Σ ‖x̂‖²) / n(n − 1), with x̂ = x/‖x‖. Values near 0.9 in deep layers mean
    that representations collapse (arXiv 2602.01308). The smallest value is −1/(n − 1). Independent
    random directions of d dimensions give 0, with a standard deviation of about √(2/d)/n.

    Args:
        tokens: (..., n, d), any real floating dtype.

    Returns:
        The mean, (...), float32, or float64 for float64. It is NaN for fewer than two tokens, or if
        one token holds NaN or inf. A token of zeros has cosine 0 with every other token.

    >>> token_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])).item()
    0.3333333432674408
    """
    n = tokens.shape[-2]
    x = unit_tokens(tokens)
    if n < 2:
        return x.new_full(x.shape[:-2], torch.nan)
    total = x.sum(dim=-2).square().sum(dim=-1)
    own = x.square().sum(dim=(-2, -1))
    return ((total - own) / (n * (n - 1))).clamp(-1.0, 1.0)


def unit_tokens(tokens: Tensor) -> Tensor:
    """Return x/‖x‖ of each token (..., n, d). Zero stays zero, and NaN or inf gives NaN."""
    x = tokens.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[-1] == 0:
        return x
    largest = x.abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def attention_logit_bound(
    query: Tensor,
    key: Tensor,
    max_norm: Tensor | float,
    *,
    num_heads: int,
    num_key_heads: int | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bound |q·k|/√d_h of each head by ‖W_q‖₂ ‖W_k‖₂ max‖x‖² / √d_h.

    The bound follows from Cauchy–Schwarz, with ‖Wx + b‖ ≤ ‖W‖₂‖x‖ + ‖b‖ for either side. Rotary
    embeddings do not change norms, so the bound holds with them. It does not hold if queries and
    keys are normalised after the projection, or if a position bias is added. The bound grows before
    the logits do. QK-Clip acts on logits above 100 (arXiv 2507.20534). A bound above 100 only means
    that such a logit is possible.

    Cost: exact spectral norms of num_heads + num_key_heads matrices of shape d_h × n. For twelve
    and twelve matrices of 64×768 this takes 40 ms on one CPU thread.

    Args:
        query: (num_heads · d_h, n), any real floating dtype. The outputs are in rows, one head
            after the other.
        key: (num_key_heads · d_h, n).
        max_norm: The largest ‖x‖₂ of the projections' inputs, a tensor of shape () or a number.
        num_heads: The number of query heads.
        num_key_heads: The number of key heads. Neighbouring query heads may share one. None means
            the number of query heads.
        query_bias: (num_heads · d_h,).
        key_bias: (num_key_heads · d_h,).
        scale: The factor on q·k. None means 1/√d_h.

    Returns:
        The bounds, (num_heads,), float32, or float64 for float64. A head with NaN or inf gives NaN.

    Raises:
        ConfigurationError: The rows cannot be divided among the heads, or the
            heads among the key heads.

    >>> eye = torch.eye(4)
    >>> attention_logit_bound(2 * eye, eye, 3.0, num_heads=1).item()  # 2 · 1 · 9 / √4
    9.0
    """
    num_key_heads = num_heads if num_key_heads is None else num_key_heads
    rows = query.shape[0]
    if (
        num_heads < 1
        or num_key_heads < 1
        or rows % num_heads
        or num_heads % num_key_heads
        or key.shape[0] != rows // num_heads * num_key_heads
    ):
        raise ConfigurationError(
            f"You gave {rows} rows of queries in {num_heads} heads and {key.shape[0]} rows of keys "
            f"in {num_key_heads}; all heads must have as many rows, and key heads divide heads."
        )
    width = rows // num_heads
    scale = 1 / math.sqrt(width) if scale is None else abs(scale)
    q = _largest_output(query, query_bias, max_norm, width)
    k = _largest_output(key, key_bias, max_norm, width)
    bound: Tensor = scale * q * k.repeat_interleave(num_heads // num_key_heads)
    return bound


def _largest_output(
    weight: Tensor, bias: Tensor | None, max_norm: Tensor | float, width: int
) -> Tensor:
    heads = weight.detach().reshape(-1, width, weight.shape[-1])
    norm: Tensor = spectral_norm(heads) * max_norm
    if bias is not None:
        shift = bias.detach().to(norm.dtype).reshape(-1, width)
        norm = norm + torch.linalg.vector_norm(shift, dim=-1)
    return norm


@dataclass(frozen=True, slots=True)
class CollapseMeasures:
    """Shares in [0, 1] and a rank, each (...), float32, or float64 for float64, without units.

    A sample of zeros gives 0 everywhere. A sample without tokens, or with NaN or inf, gives NaN.
    """

    mean_share: Tensor
    """n‖μ‖² / Σ‖x_i‖², which is 1 if all tokens are equal. One minus this share is the within-class
    variability of neural collapse (Papyan, Han & Donoho 2020, NC1), with all tokens as one class
    and divided by the total energy [ours]."""
    top_share: Tensor
    """σ₁²/Σσ² of the tokens, the inverse of their stable rank. It is at least `mean_share`."""
    centred_top_share: Tensor
    """The same share of x_i − μ. It shows a second direction behind the mean, and
    is 0 for equal tokens."""
    effective_rank: Tensor
    """exp(−Σ p_i ln p_i) of the uncentred tokens with p_i = σ_i/Σσ (Roy & Vetterli 2007). It is at
    most min(n, d), so you can compare it only at equal sample sizes."""


def collapse_measures(tokens: Tensor) -> CollapseMeasures:
    """Measure a sample of tokens.

    Neural collapse is defined by class means. A language model has no classes, so these numbers
    treat the sample as one class.

    Cost: the singular values of three n × d matrices. At 256×768 this takes
    53 ms on one CPU thread.

    Args:
        tokens: (..., n, d), any real floating dtype.

    >>> measures = collapse_measures(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
    >>> round(measures.mean_share.item(), 4), round(measures.top_share.item(), 4)
    (0.9, 0.9)
    """
    if 0 in tokens.shape[-2:]:
        nothing = torch.full(tokens.shape[:-2], torch.nan, dtype=compute_dtype(tokens))
        nothing = nothing.to(tokens.device)
        return CollapseMeasures(nothing, nothing, nothing, nothing)
    scaled = unit_scaled(tokens)
    x = scaled.matrix
    mean = x.mean(dim=-2, keepdim=True)
    energy = x.square().sum(dim=(-2, -1))
    mean_share = x.shape[-2] * mean.square().sum(dim=(-2, -1)) / _positive(energy)
    spread = x - mean
    # The rounding errors of equal tokens must not count as a direction.
    noise = torch.finfo(x.dtype).eps ** 2 * x.shape[-2] * energy
    left = torch.where(spread.square().sum(dim=(-2, -1)) > noise, 1.0, 0.0)
    mean_share, top_share, centred = (
        torch.where(scaled.finite, share, torch.nan)
        for share in (mean_share.clamp_max(1.0), _top_share(x), left * _top_share(spread))
    )
    return CollapseMeasures(mean_share, top_share, centred, effective_rank(tokens))


def _top_share(x: Tensor) -> Tensor:
    squares = torch.linalg.svdvals(x).square()
    share: Tensor = squares[..., 0] / _positive(squares.sum(dim=-1))
    return share


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)


# A direction below a thousandth of one token's energy counts as lost [ours].
DEFAULT_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class LogDetBounds:
    """L = log det(X̂X̂ᵀ + εI) of a sample, and an interval that contains L of all N tokens.

    All are (...), float32 or float64, in nats.
    """

    sample: Tensor
    """L of the n tokens of the sample."""
    lower: Tensor
    """A lower bound of L for all N tokens, whatever the unseen nonzero tokens are."""
    upper: Tensor
    """An upper bound of L for all N tokens, whatever the unseen tokens are."""


def gram_log_det(tokens: Tensor, *, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Return log det(X̂X̂ᵀ + εI), the log-volume that the normalised tokens span.

    arXiv 2601.03385 tracks this quantity over time. The unit length of tokens and the ridge ε are
    ours. Without a ridge, more tokens than dimensions would give −∞. The value is at least
    n log ε + log(1 + n/ε), for tokens on one line, and at most n log(1 + ε), for orthogonal tokens.
    You can compare values only at equal numbers of tokens and equal ridges.

    Cost: the singular values of an n × d matrix. At 256×768 this takes 17 ms on one CPU thread. The
    Gram matrix would lose the singular values below 3e-4.

    Args:
        tokens: (..., n, d), any real floating dtype.
        ridge: ε > 0, relative to the energy 1 of one token.

    Returns:
        The log-determinant, (...), float32, or float64 for float64. It is NaN without tokens, or if
        a token holds NaN or inf.

    >>> round(gram_log_det(torch.eye(3), ridge=1.0).item(), 4)  # 3 log 2
    2.0794
    """
    return log_det_bounds(tokens, tokens.shape[-2], ridge=ridge).sample


def log_det_bounds(
    tokens: Tensor, num_tokens: int, *, ridge: float = DEFAULT_RIDGE
) -> LogDetBounds:
    """Bound L of N tokens by n of them, without an assumption on how the n tokens were drawn.

    The bounds are ours, because the published ones are not public. docs/theory_health.md has the
    proofs. Let a₁ ≥ … ≥ a_d be the eigenvalues of X̂ᵀX̂ + εI of the sample, and let k = N − n.

    - The lower bound is L_n + k log ε + log(1 + k/a₁). It is attained if all other tokens lie along
      the first direction.
    - The upper bound is L_n + k log ε + Σ_i log max(w/a_i, 1) over the min(k, d) smallest,
      with w such that Σ_i max(w − a_i, 0) = k. It is attained if the other tokens lie where
      the sample is weakest.

    Since both bounds are attained, the sample's spectrum allows no better ones. The interval is
    narrow if the sample holds most of the tokens.

    Args:
        tokens: The sample, (..., n, d), any real floating dtype.
        num_tokens: N ≥ n.
        ridge: ε, as in `gram_log_det`.

    Raises:
        ConfigurationError: The ridge is not above 0, or N < n.

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
    # The matrix has d eigenvalues. Those after the first min(n, d) are ε.
    a = torch.nn.functional.pad(energy, (0, d - energy.shape[-1])) + ridge
    k = num_tokens - n
    sample = n * math.log(ridge) + (a / ridge).log().sum(dim=-1)
    beyond = sample + k * math.log(ridge)
    lower = beyond + torch.log1p(k / a[..., 0])
    upper = beyond + _flooding(a.flip(-1)[..., : min(k, d)], k)
    upper = torch.maximum(upper, lower)  # rounding must not swap them
    return LogDetBounds(*(torch.where(finite, v, torch.nan) for v in (sample, lower, upper)))


def _flooding(rising: Tensor, amount: int) -> Tensor:
    """Return Σ log max(w/a_i, 1), Σ max(w − a_i, 0) = amount, for ascending a of shape (..., j)."""
    count = torch.arange(1, rising.shape[-1] + 1, device=rising.device, dtype=rising.dtype)
    levels = (rising.cumsum(dim=-1) + amount) / count
    # If the level w is above the j lowest values, it is at least the j-th.
    # The last such j is right.
    num_flooded = (levels >= rising).sum(dim=-1, keepdim=True)
    level = levels.gather(-1, (num_flooded - 1).clamp_min(0)) if amount else levels
    return (level / rising).clamp_min(1.0).log().sum(dim=-1)
