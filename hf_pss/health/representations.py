"""Metrics of hidden states: collapse, cosine, volume and signs of tokens; a bound of their logits.

Each metric takes a sample of tokens. In training, `hf_pss.health.meter` collects it in a
`TokenSample`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_pss.linalg import effective_rank, spectral_norm
from hf_pss.linalg.scaling import compute_dtype, unit_scaled


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


class TokenSample:
    """A uniform sample without replacement of the tokens that leave a block, over all passes.

    It keeps the rows with the smallest independent uniform keys. This is a form of Vitter's
    reservoirs (ACM TOMS 11(1)) with priorities. The keys are on the host, so no hook waits for the
    device. If blocks see equally many tokens, as the blocks of a decoder do, samples of one seed
    keep the same tokens in the same order.

    Cost: each forward pass copies at most ``max_tokens`` rows. For 8,192 tokens of width 768 this
    takes 0.2 ms on one CPU thread. It does not read from the device.

    Args:
        max_tokens: The largest number of rows to keep.
        seed: The seed of the sample. The global generator of torch is not used.
    """

    def __init__(self, max_tokens: int, seed: int = 0) -> None:
        self._max_tokens = max_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, 0)
        """The tokens, (n, d), float32. (0, 0) before the first pass."""
        self.num_seen = 0
        """The number of tokens that were added."""

    def add(self, tokens: Tensor, positions: Tensor) -> None:
        """Add the tokens (..., d) at these positions of the flattened batch, int64 on the host."""
        num_held = len(self._keys)
        fresh = torch.rand(len(positions), generator=self._generator, dtype=torch.float64)
        keys = torch.cat([self._keys, fresh])
        self._keys, kept = keys.topk(min(self._max_tokens, len(keys)), largest=False)
        old, new = kept[kept < num_held], kept[kept >= num_held] - num_held
        rows = _take(tokens.detach().reshape(-1, tokens.shape[-1]), positions[new])
        if num_held:
            # The rows that are already held come first, and their keys are in the same order.
            is_old = kept < num_held
            self._keys = torch.cat([self._keys[is_old], self._keys[~is_old]])
            rows = torch.cat([_take(self.rows, old), rows.to(self.rows.device)])
        self.rows = rows
        self.num_seen += len(positions)


def _take(rows: Tensor, positions: Tensor) -> Tensor:
    return rows[positions.to(rows.device, non_blocking=True)].float()


def hidden_states(output: Any) -> Tensor | None:
    """Return the hidden states (batch, tokens, d) of a block's output, or None if it has none.

    The output is the hidden states, or a tuple, list or mapping that begins with them.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    is_usable = isinstance(output, Tensor) and output.ndim > 0 and output.is_floating_point()
    return output if is_usable else None


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
    x = tokens.detach().to(compute_dtype(tokens))
    if x.shape[-1] == 0:
        return x
    largest = x.abs().amax(dim=-1, keepdim=True)
    x = x / _positive(largest)  # squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / _positive(length)


def spectral_alignment(inputs: Tensor, v: Tensor) -> Tensor:
    """Return cos(x_t, v₁) of each token t.

    arXiv 2510.04202 calls it the alignment of a layer's input with its weight's principal singular
    vector. If the weight has outputs in rows, this is the right singular vector.

    Args:
        inputs: (..., n), any real floating dtype. These are the inputs of the layer.
        v: (n,) or (n, k). The unit vectors are in columns.

    Returns:
        The cosines, (...) or (..., k), float32. A token of zeros gives 0, and a token
        with NaN or inf gives NaN.

    >>> spectral_alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])).item()
    0.6000000238418579
    """
    x = inputs.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    x = x / _positive(largest)  # squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=v.ndim > 1)
    return (x @ v.float()) / _positive(length)


def sign_diversity(alignment: Tensor) -> Tensor:
    """Return 1 − |mean of the signs| over the tokens. 1 means balanced signs, 0 means equal signs.

    A collapse of this number warns of an explosion (arXiv 2510.04202). The formula is ours. It is
    twice the share of the rarer sign. Zeros have no sign and do not count.

    Args:
        alignment: (tokens, ...), a result of `spectral_alignment`.

    Returns:
        The diversity, (...), float32. It is NaN if an alignment is NaN, or if
        no alignment has a sign.

    >>> sign_diversity(torch.tensor([0.9, 0.1, 0.2, -0.5])).item()
    0.5
    """
    kinds = (alignment > 0, alignment < 0, alignment.isnan())
    positive, negative, broken = (kind.sum(dim=0, dtype=torch.float32) for kind in kinds)
    signed = positive + negative
    diversity = 2 * torch.minimum(positive, negative) / _positive(signed)
    return torch.where((broken == 0) & (signed > 0), diversity, torch.nan)


def attention_logit_bound(
    query: Tensor,
    key: Tensor,
    max_norm: Tensor | float,
    *,
    num_heads: int,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bound |q·k|/√d_h of each head by ‖W_q‖₂ ‖W_k‖₂ max‖x‖² / √d_h.

    The bound follows from Cauchy–Schwarz, with ‖Wx + b‖ ≤ ‖W‖₂‖x‖ + ‖b‖ for either side. Rotary
    embeddings do not change norms, so the bound holds with them. It does not hold if queries and
    keys are normalised after the projection, or if a position bias is added. The bound grows before
    the logits do. QK-Clip acts on logits above 100 (arXiv 2507.20534). A bound above 100 only means
    that a logit above 100 is possible.

    Cost: exact spectral norms of num_heads + num_key_heads matrices of shape d_h × n. For twelve
    and twelve matrices of 64×768 this takes 40 ms on one CPU thread.

    Args:
        query: (num_heads · d_h, n), any real floating dtype. The outputs are in rows, one head
            after the other.
        key: (num_key_heads · d_h, n). Neighbouring query heads may share a key head.
        max_norm: The largest ‖x‖₂ of the projections' inputs, a tensor of shape () or a number.
        num_heads: The number of query heads.
        query_bias: (num_heads · d_h,).
        key_bias: (num_key_heads · d_h,).
        scale: The factor on q·k. None means 1/√d_h.

    Returns:
        The bounds, (num_heads,), float32, or float64 for float64. A head with NaN or inf gives NaN.

    >>> eye = torch.eye(4)
    >>> attention_logit_bound(2 * eye, eye, 3.0, num_heads=1).item()  # 2 · 1 · 9 / √4
    9.0
    """
    width = query.shape[0] // num_heads
    scale = 1 / math.sqrt(width) if scale is None else abs(scale)
    q = _largest_output(query, query_bias, max_norm, width)
    k = _largest_output(key, key_bias, max_norm, width)
    bound: Tensor = scale * q * k.repeat_interleave(num_heads // len(k))
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


class CollapseMeasures(NamedTuple):
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
        nothing = tokens.new_full(tokens.shape[:-2], torch.nan, dtype=compute_dtype(tokens))
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


class LogDetBounds(NamedTuple):
    """L = log det(X̂X̂ᵀ + εI) of a sample, and an interval that contains L of all N tokens.

    All are (...), float32 or float64, in nats.
    """

    sample: Tensor
    """L of the n tokens of the sample."""
    lower: Tensor
    """A lower bound of L for all N tokens, whatever the unseen nonzero tokens are."""
    upper: Tensor
    """An upper bound of L for all N tokens, whatever the unseen tokens are."""


def log_det_bounds(
    tokens: Tensor, num_tokens: int, *, ridge: float = DEFAULT_RIDGE
) -> LogDetBounds:
    """Return L = log det(X̂X̂ᵀ + εI) of n tokens, and bounds of L of N tokens that contain them.

    L is the log-volume that the normalised tokens span. arXiv 2601.03385 tracks this quantity over
    time. The unit length of tokens and the ridge ε are ours. Without a ridge, more tokens than
    dimensions would give −∞. L is at least n log ε + log(1 + n/ε), for tokens on one line, and at
    most n log(1 + ε), for orthogonal tokens. You can compare values only at equal numbers of tokens
    and equal ridges.

    The bounds make no assumption on how the n tokens were drawn. They are ours, because the
    published ones are not public. docs/theory_health.md has the proofs. Let a₁ ≥ … ≥ a_d be the
    eigenvalues of X̂ᵀX̂ + εI of the sample, and let k = N − n.

    - The lower bound is L_n + k log ε + log(1 + k/a₁). It is attained if all other tokens lie along
      the first direction.
    - The upper bound is L_n + k log ε + Σ_i log max(w/a_i, 1) over the min(k, d) smallest,
      with w such that Σ_i max(w − a_i, 0) = k. It is attained if the other tokens lie where
      the sample is weakest.

    Since both bounds are attained, the sample's spectrum allows no better ones. The interval is
    narrow if the sample holds most of the tokens.

    Cost: the singular values of an n × d matrix. At 256×768 this takes 17 ms on one CPU thread. The
    Gram matrix would lose the singular values below 3e-4.

    Args:
        tokens: The sample, (..., n, d), any real floating dtype.
        num_tokens: N ≥ n.
        ridge: ε > 0, relative to the energy 1 of one token.

    Returns:
        NaN without tokens, or if a token holds NaN or inf.

    >>> bounds = log_det_bounds(torch.eye(2), 4, ridge=1.0)  # two more tokens
    >>> round(bounds.lower.exp().item(), 4), round(bounds.upper.exp().item(), 4)
    (8.0, 9.0)
    """
    n, d = tokens.shape[-2:]
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
    # levels[j] is the water level if exactly the j lowest values are flooded. It is valid while it
    # is at least the j-th value, so take the largest such j.
    num_flooded = (levels >= rising).sum(dim=-1, keepdim=True)
    level = levels.gather(-1, (num_flooded - 1).clamp_min(0)) if amount else levels
    return (level / rising).clamp_min(1.0).log().sum(dim=-1)
